"""How fast, and in how much memory, text becomes token files: prepare_data.py, and megatron-core's method on the same text."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer

from incr_ds.bench.results import ResultTable
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.study.text import write_texts
from incr_ds.testing.contest import Contestant, Result, race

TOOLS = Path(__file__).resolve().parent
RIVAL = (
    "megatron-core's method: its package has no preprocess_data.py, so this is the loop of that tool written here: a "
    "multiprocessing.Pool whose workers open the tokenizer, imap over the lines with chunks of 32, one document at a time "
    "through transformers' tokenizer, and megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder in the main process"
)
HEADINGS = ("tokenizer", "program", "seconds", "MB/s", "CPU s", "of it start-up", "MB per CPU s after it", "peak MiB")
CHUNK = 32  # lines that its pool hands out at once
SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>")
SAMPLE = 4_000_000  # characters that the tokenizers are trained on

_tokenizer: Any  # of a worker of the rival


def _begin(folder: str) -> None:
    global _tokenizer
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(folder)


def _encode(line: str) -> tuple[list[int], list[int]]:
    ids = _tokenizer(json.loads(line)["text"]).input_ids
    ids.append(_tokenizer.eos_token_id)
    return ids, [len(ids)]


def megatrons_method(text: Path, folder: str, prefix: Path, workers: int) -> None:
    """What RIVAL describes: tokenize the lines of ``text`` with the tokenizer ``folder`` into PREFIX.bin and .idx."""
    from transformers import AutoTokenizer

    from incr_ds.data.megatron import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True)
    dtype = DType.optimal_dtype(len(AutoTokenizer.from_pretrained(folder)))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with multiprocessing.Pool(workers, _begin, (folder,)) as pool, open(text, encoding="utf-8") as lines:
        for ids, lengths in pool.imap(_encode, lines, CHUNK):
            builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")


def write_documents(home: Path, num_bytes: int) -> list[str]:
    """Write text.jsonl, and one.jsonl with its first document. Returns the documents.

    Those with the text of a special token are left out: Megatron's tool makes the token of it, and prepare_data.py does not.
    """
    code = next(item.path for item in write_texts(home, num_bytes) if item.path.name == "code.jsonl")
    texts = [json.loads(line)["text"] for line in code.read_text(encoding="utf-8").splitlines()]
    kept = [text for text in texts if not any(token in text for token in SPECIAL)]
    for name, documents in (("text", kept), ("one", kept[:1])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (home / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return kept


def train_tokenizers(home: Path, text: str) -> dict[str, Path]:
    """A sentencepiece BPE as Llama 2 has one, and a byte-level BPE as GPT-2 and Llama 3 have one."""
    train_sentencepiece([text], 4096, home / "sentencepiece")
    return {"sentencepiece BPE": home / "sentencepiece", "byte-level BPE": train_byte_level(home / "byte-level", text)}


def train_byte_level(folder: Path, text: str) -> Path:
    """Train a byte-level BPE and save it as a transformers tokenizer in ``folder``."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bytewise = ByteLevelBPETokenizer()
    bytewise.train_from_iterator(iter([text]), 8192, special_tokens=["<|endoftext|>"], show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bytewise._tokenizer, eos_token="<|endoftext|>")
    made.save_pretrained(folder)
    return folder


def contestants(text: Path, short: Path, tokenizer: Path, home: Path, workers: Sequence[int]) -> list[Contestant]:
    """Both programs with each number of workers, and with one document, which shows what their start-up takes."""
    found = []
    for program, command_of in (("incr_ds", _our_command), ("megatron-core's method", _their_command)):
        output = home / "out"
        for label, source, count in [
            ("start-up", short, max(workers)),
            *((f"{n} workers", text, n) for n in workers),
        ]:
            words = command_of(source, tokenizer, output / "x", count)
            found.append(Contestant(f"{program}, {label}", words, (source,), output))
    return found


def _our_command(text: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    words = [sys.executable, TOOLS / "prepare_data.py", "--input", text, "--tokenizer", tokenizer, "--output", prefix]
    return [*map(str, words), "--held-out", "0", "--workers", str(workers), "--json"]


def _their_command(text: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    return [sys.executable, *map(str, (Path(__file__).resolve(), "megatron", text, tokenizer, prefix, workers))]


def same_bytes(text: Path, tokenizer: Path, home: Path, workers: int) -> bool:
    """Whether both programs write the same .bin and .idx."""
    for name, command_of in (("ours", _our_command), ("theirs", _their_command)):
        subprocess.run(command_of(text, tokenizer, home / name / "x", workers), check=True, capture_output=True)
    written = [
        [(home / name / f"x{middle}{ending}").read_bytes() for ending in (".bin", ".idx")]
        for name, middle in (("ours", "_train_text_document"), ("theirs", ""))
    ]
    shutil.rmtree(home / "ours")
    shutil.rmtree(home / "theirs")
    return written[0] == written[1]


def benchmark(num_bytes: int, workers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Race both programs on the same text with each tokenizer."""
    with tempfile.TemporaryDirectory(prefix="bench_prepare_data_") as folder:
        home = Path(folder)
        documents, facts = write_documents(home, num_bytes), machine()
        size = sum(len(text.encode()) for text in documents)
        races = []
        for name, tokenizer in train_tokenizers(home, "".join(documents)[:SAMPLE]).items():
            equal = same_bytes(home / "text.jsonl", tokenizer, home, max(workers))
            found = race(contestants(home / "text.jsonl", home / "one.jsonl", tokenizer, home, workers), rounds)
            races.append(_summary(name, found, size, workers, equal))
        return {
            "machine": facts,
            "rival": RIVAL,
            "text": {"bytes": size, "documents": len(documents)},
            "rounds": rounds,
            "races": races,
        }


def _summary(
    tokenizer: str, found: Sequence[Result], num_bytes: int, workers: Sequence[int], equal: bool
) -> dict[str, Any]:
    by_name = {result.name: result for result in found}
    rows = []
    for result in found:
        program, _, label = result.name.rpartition(", ")
        if label != "start-up":
            start = by_name[f"{program}, start-up"]
            rows.append(
                {
                    "program": result.name,
                    "seconds": result.seconds,
                    "bytes_per_second": num_bytes / result.seconds,
                    "start_up_seconds": start.seconds,
                    "cpu_seconds": result.cpu_seconds,
                    "start_up_cpu_seconds": start.cpu_seconds,
                    "bytes_per_cpu_second_after_start_up": num_bytes / (result.cpu_seconds - start.cpu_seconds),
                    "peak_anonymous_bytes": result.peak,
                }
            )
    ratios = {
        key: {str(n): _ratio(rows, key, n) for n in workers}
        for key in ("bytes_per_second", "bytes_per_cpu_second_after_start_up")
    }
    return {"tokenizer": tokenizer, "same_bytes": equal, "programs": rows, "relative_to_rival_by_workers": ratios}


def _ratio(rows: Sequence[Mapping[str, Any]], key: str, workers: int) -> float:
    ours, theirs = (
        next(row[key] for row in rows if row["program"] == f"{program}, {workers} workers")
        for program in ("incr_ds", "megatron-core's method")
    )
    return float(ours / theirs)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    packages = ("megatron-core", "transformers", "tokenizers", "sentencepiece", "numpy")
    return {
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "load_average_before": os.getloadavg()[0],
    }


def _cells(tokenizer: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        tokenizer,
        row["program"],
        f"{row['seconds']:.2f}",
        f"{row['bytes_per_second'] / 1e6:.2f}",
        f"{row['cpu_seconds']:.2f}",
        f"{row['start_up_cpu_seconds']:.2f}",
        f"{row['bytes_per_cpu_second_after_start_up'] / 1e6:.2f}",
        f"{row['peak_anonymous_bytes'] / (1 << 20):,.0f}",
    )


def _table(report: Mapping[str, Any]) -> ResultTable:
    rows = [_cells(entry["tokenizer"], row) for entry in report["races"] for row in entry["programs"]]
    return ResultTable("text to token files", HEADINGS, rows)


def _markdown(report: Mapping[str, Any], note: str) -> str:
    facts, text = report["machine"], report["text"]
    lines = [
        "# Preparing data: speed and memory",
        "",
        f"{text['bytes']:,} bytes of Python code in {text['documents']:,} documents (JSON lines), none of which has the text "
        f"of a special token. Medians of {report['rounds']} rounds in turns.",
        *([note] if note else []),
        "Memory is summed over the processes of a program, so pages that forked workers share count in each.",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        "",
        f"The rival is {report['rival']}.",
        "",
        *_table(report).markdown(),
        "",
    ]
    for entry in report["races"]:
        equal = "the same bytes" if entry["same_bytes"] else "other bytes"
        ratios = entry["relative_to_rival_by_workers"]
        whole, steady = (
            ", ".join(f"{ratio:.2f} with {n} workers" for n, ratio in ratios[key].items()) for key in ratios
        )
        lines.append(
            f"- {entry['tokenizer']}: relative to the rival's, the speed of the whole program is {whole}. Per CPU second after "
            f"start-up it is {steady}. Both write {equal}."
        )
    return "".join(f"{_wrapped(line)}\n" for line in lines)


def _wrapped(line: str) -> str:
    """A paragraph or an item of a list in lines of at most 119 characters. Rows of tables stay whole."""
    return line if line.startswith("|") else fill(line, 119, subsequent_indent="  " if line.startswith("- ") else "")


@command
def main(
    output: Annotated[Path, typer.Option(help="Folder for bench_prepare_data.json and .md.")],
    max_bytes: Annotated[
        int, typer.Option(min=100_000, help="Bytes of text, from the installed packages.")
    ] = 20_000_000,
    workers: Annotated[str, typer.Option(help="Worker counts, separated by commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each program; medians are reported.")] = 3,
    note: Annotated[str, typer.Option(help="A sentence about the machine, for the page.")] = "",
    json_only: Json = False,
) -> None:
    """Race both programs. Rates count the bytes of the documents' text."""
    report = benchmark(max_bytes, [int(count) for count in workers.split(",")], rounds) | {"note": note}
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench_prepare_data.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "bench_prepare_data.md").write_text(_markdown(report, note), encoding="utf-8")
    if json_only:
        print_json(report)
        return
    console.print(_table(report).on_console())


if __name__ == "__main__":
    if sys.argv[1:2] == ["megatron"]:
        megatrons_method(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
