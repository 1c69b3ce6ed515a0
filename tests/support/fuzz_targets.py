"""What is fuzzed: for each reader a folder that it accepts, the file in it that changes, and the first contents of that file."""

import gzip
import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hostile
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from megatron_rank_folders import write_ranks
from safetensors.numpy import save_file
from sources import write_synthetic
from token_data import write_documents
from torch_dist_folders import write_source

from incr_ds.arch.multipliers import Multipliers, multipliers_text
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import publish
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.errors import IncrError
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "faults" / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader: ``opened`` is called with a folder or file of its own in which ``file`` has the content that is tried.

    ``pickled``: the content is only the pickle of the archive ``file``. ``same``: what is accepted must be the same tensors.
    """

    opened: Callable[[Path], None]
    source: str
    file: str
    pickled: bool = False
    same: bool = False
    seeds: Callable[[Path], list[bytes]] = lambda folder: []


class Prepared:
    """A target whose folder exists. ``try_content`` opens it with one content."""

    def __init__(self, target, folder):
        self.target, self.folder, self.canary = target, folder, folder.parent.parent / "canary"
        self.path = min(folder.glob(target.file))
        self.original = self.path.read_bytes()
        self.records = _records(self.original) if target.pickled else []
        self.truth = tensors(folder) if target.same else {}

    def contents(self):
        """The first contents: the valid one, and those of an attacker."""
        given = self.target.seeds(self.folder)
        valid = (
            next(data for name, data in self.records if name.endswith("/data.pkl")) if self.records else self.original
        )
        poisoned = [pickle.dumps(one, 2) for one in hostile.payloads(self.canary).values()]
        return [valid, *given, *(poisoned if self.target.pickled else [])]

    def write(self, content):
        self.path.write_bytes(self._archive(content) if self.records else content)

    def _archive(self, pickled):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in self.records:
                archive.writestr(name, pickled if name.endswith("/data.pkl") else data)
        return stream.getvalue()

    def try_content(self, content):
        """Open the content. Returns whether it was accepted; any error that is not an IncrError is a defect."""
        self.write(content)
        try:
            self.target.opened(self.folder)
            if self.target.same:
                found = tensors(self.folder)
                assert found.keys() == self.truth.keys(), "other tensors were accepted"
                assert all(torch.equal(found[key], self.truth[key]) for key in found), "changed values were accepted"
        except IncrError as error:
            assert len(str(error)) < 20_000 and "\x1b" not in str(error), "not a readable message"
            return False
        return True


def _records(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(record.filename, archive.read(record)) for record in archive.infolist()]


def tensors(folder):
    checkpoint = open_source(folder)
    names = [spec.name for spec in checkpoint.architecture.stored]
    return {(name, state): checkpoint.read(name, state).clone() for name in names for state in checkpoint.facts.states}


# Folders that are accepted.


def _checkpoint(**layout):
    def write(folder):
        folder.mkdir()
        write_synthetic(folder, pico_architecture(num_hidden_layers=1, vocab_size=11), **layout)
        (folder / "source" / "manifest.json").unlink()
        return folder / "source"

    return write


def _published(folder):
    folder.mkdir()
    write_synthetic(folder, pico_architecture(num_hidden_layers=1, vocab_size=11), data_parallel=2)
    return folder / "source"


def _huggingface(folder):
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(folder)
    return folder


def _indexed(folder):
    names = [*drawn_model(small_architecture("llama"), torch.float32).state_dict()]
    _huggingface(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _bin(folder):
    _huggingface(folder)
    (folder / "model.safetensors").unlink()
    torch.save(drawn_model(small_architecture("llama"), torch.float32).state_dict(), folder / "pytorch_model.bin")
    return folder


def _torch_dist(folder):
    folder.mkdir()
    write_source(folder, SyntheticCheckpoint(pico_architecture(num_hidden_layers=1, vocab_size=11)))
    return folder


def _ranks(optimizer):
    def write(folder):
        folder.mkdir()
        source = SyntheticCheckpoint(pico_architecture(num_hidden_layers=1, vocab_size=11))
        write_ranks(folder, source, (1, 1), optimizer)
        return folder

    return write


def _one_file(name, content=b""):
    def write(folder):
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder

    return write


def _data(folder):
    folder.mkdir()
    write_documents(folder / "data", [[1, 2, 3], [4], [5, 6]])
    return folder


def _multipliers(folder):
    text = multipliers_text({"a": Multipliers(0.5, 1.0, 1.0), "b": Multipliers(1.0, 2.0, 1.0)})
    return _one_file("multipliers.json", text.encode())(folder)


def _parquet(folder):
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", ""]}), folder / "text.parquet")
    return folder


def _sentencepiece(folder):
    train_sentencepiece((f"the quick brown fox number {number} jumps" for number in range(400)), 330, folder)
    return folder


def _cache(folder):
    facts = {"teacher": "t", "teacher_checksum": "0", "corpora": [{"fingerprint": "0", "weight": 1.0}], "seed": 1}
    facts |= {"sequence_length": 4, "first_sample": 0, "samples": 3, "shard_samples": 2, "vocabulary": 11, "top_k": 2}
    facts |= {"temperature": 1.0, "precision": "fp32", "stored": "fp32"}
    with publish(folder, "teacher cache", {"cache": facts}) as work:
        for name, count in (("shard_00000000.safetensors", 2), ("shard_00000002.safetensors", 1)):
            indices = np.zeros((count, 4, 2), np.uint8)
            save_file({"indices": indices, "log_probs": -np.ones((count, 4, 2), np.float32)}, work / name)
    return folder


SOURCES = {
    "zero-1": _checkpoint(data_parallel=2),
    "zero-3": _checkpoint(data_parallel=2, zero_stage=3),
    "universal": _checkpoint(format="universal"),
    "megatron": _checkpoint(modules="megatron-deepspeed"),
    "published": _published,
    "huggingface": _huggingface,
    "indexed": _indexed,
    "bin": _bin,
    "torch_dist": _torch_dist,
    "ranks": _ranks("mixed"),
    "ranks, distributed": _ranks("distributed"),
    "yaml": _one_file("settings.yaml", b"{}"),
    "json": _one_file("settings.json", b"{}"),
    "data": _data,
    "multipliers": _multipliers,
    "metrics": _one_file("metrics.jsonl"),
    "lines": _one_file("text.jsonl", b'{"text": "one"}\n'),
    "gzip": _one_file("text.jsonl.gz", gzip.compress(b'{"text": "one"}\n')),
    "parquet": _parquet,
    "tokenizer": _one_file("tokenizer.json", b"{}"),
    "sentencepiece": _sentencepiece,
    "cache": _cache,
}


# What opens them.


def _open_settings(kind):
    return lambda folder: hostile.OPENERS[kind](folder / "settings.yaml")


def _open_deepspeed(folder):
    from incr_ds.config.deepspeed_file import read_deepspeed_file

    read_deepspeed_file(folder / "settings.json")


def _open_multipliers(folder):
    from incr_ds.arch.multipliers import read_multipliers

    read_multipliers(folder)


def _open_metrics(folder):
    from incr_ds.train.metrics import read_damaged_metrics, read_metrics

    read_damaged_metrics(folder / "metrics.jsonl")
    read_metrics(folder / "metrics.jsonl")


def _open_text(name):
    def opened(folder):
        from incr_ds.data.documents import InputPlace, documents_of, read_batches
        from incr_ds.data.selection import Selection

        path = folder / name
        selection = Selection((path,), (path.stat().st_size,), 0, 0)
        for batch in read_batches(selection, InputPlace(0), "text"):
            for piece in batch.pieces:
                list(documents_of(piece, "text"))

    return opened


def _open_cache(folder):
    from incr_ds.checkpoint.publish import verify_manifest
    from incr_ds.data.teacher_cache import TeacherCache, read_facts

    facts = read_facts(folder)
    verify_manifest(folder)
    TeacherCache(folder, facts, facts.numbers).entries(facts.numbers)


def _open_manifest(folder):
    from incr_ds.checkpoint.publish import verify_manifest

    verify_manifest(folder)


def _source(folder):
    hostile.OPENERS["source"](folder)


def _files(pattern):
    return lambda _: [path.read_bytes() for path in sorted(ROOT.glob(pattern))]


def _yaml_texts(_):
    return [text.encode() for text in hostile.YAML_TEXTS.values() if len(text) < 5000]


def _safetensors(_):
    return [content for content in hostile.SAFETENSORS.values() if len(content) < 5000]


def _indexes(_):
    return list(hostile.INDEXES.values())


def _tokenizers(_):
    return [content for content in hostile.TOKENIZERS["tokenizer.json"].values() if len(content) < 5000] + [WORDS]


WORDS = json.dumps(
    {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"some": 0, "text": 1, "?": 2}, "unk_token": "?"},
    }
).encode()


def _both(*functions):
    return lambda folder: [content for function in functions for content in function(folder)]


ROWS = (
    b'{"kind": "train", "step": 1, "tokens": 64, "flops": 1.0, "loss": 2.5}\n'
    b'{"kind": "evaluation", "step": 1, "tokens": 64, "flops": 1.0, "loss": 2.5}\n'
)

TARGETS = {
    "run file": Target(
        _open_settings("run file"), "yaml", "*.yaml", seeds=_both(_files("ds_configs/runs/*.yaml"), _yaml_texts)
    ),
    "recipe": Target(
        _open_settings("recipe"), "yaml", "*.yaml", seeds=_both(_files("ds_configs/growth/*.yaml"), _yaml_texts)
    ),
    "study": Target(_open_settings("study"), "yaml", "*.yaml", seeds=_files("ds_configs/studies/*.yaml")),
    "DeepSpeed settings": Target(_open_deepspeed, "json", "*.json", seeds=_files("ds_configs/deepspeed/*.json")),
    "multipliers": Target(_open_multipliers, "multipliers", "*.json"),
    "ZeRO-1 weights, pickle": Target(_source, "zero-1", "*/mp_rank_00_model_states.pt", pickled=True),
    "ZeRO-1 optimizer, pickle": Target(_source, "zero-1", "*/*optim_states.pt", pickled=True),
    "ZeRO-3 optimizer, pickle": Target(_source, "zero-3", "*/*optim_states.pt", pickled=True),
    "universal, pickle": Target(_source, "universal", "**/zero/*/exp_avg.pt", pickled=True),
    "Megatron-DeepSpeed layer, pickle": Target(_source, "megatron", "*/layer_*.pt", pickled=True),
    "pytorch_model.bin, pickle": Target(_source, "bin", "pytorch_model.bin", pickled=True),
    "archive": Target(_source, "zero-1", "*/*optim_states.pt"),
    "latest": Target(_source, "zero-1", "latest", seeds=lambda _: [tag.encode()[:200] for tag in hostile.TAGS]),
    "config of a checkpoint": Target(_source, "zero-1", "**/config.json"),
    "manifest": Target(_open_manifest, "published", "manifest.json"),
    "published manifest": Target(_source, "published", "manifest.json", same=True),
    "published optimizer file": Target(_source, "published", "*/*optim_states.pt", same=True),
    "config": Target(_source, "huggingface", "config.json"),
    "safetensors": Target(_source, "huggingface", "model.safetensors", seeds=_safetensors),
    "weight map": Target(_source, "indexed", "*.index.json"),
    "torch_dist metadata": Target(_source, "torch_dist", "iter_*/.metadata"),
    "torch_dist common.pt, pickle": Target(_source, "torch_dist", "iter_*/common.pt", pickled=True),
    "Megatron-LM rank, pickle": Target(_source, "ranks", "iter_*/*/model_optim_rng.pt", pickled=True),
    "Megatron-LM buffer, pickle": Target(_source, "ranks, distributed", "iter_*/*/distrib_optim.pt", pickled=True),
    "torch_dist shard": Target(_source, "torch_dist", "iter_*/*.distcp"),
    "data index": Target(lambda folder: hostile.OPENERS["data"](folder / "data"), "data", "data.idx", seeds=_indexes),
    "metrics": Target(_open_metrics, "metrics", "metrics.jsonl", seeds=lambda _: [ROWS]),
    "JSON lines": Target(_open_text("text.jsonl"), "lines", "text.jsonl"),
    "gzip": Target(_open_text("text.jsonl.gz"), "gzip", "text.jsonl.gz"),
    "parquet": Target(_open_text("text.parquet"), "parquet", "text.parquet"),
    "tokenizer.json": Target(
        lambda folder: hostile.OPENERS["tokenizer"](folder / "tokenizer.json"),
        "tokenizer",
        "tokenizer.json",
        seeds=_tokenizers,
    ),
    "sentencepiece": Target(
        lambda folder: hostile.OPENERS["tokenizer"](folder / "tokenizer.model"), "sentencepiece", "tokenizer.model"
    ),
    "teacher cache": Target(_open_cache, "cache", "manifest.json"),
    "teacher cache shard": Target(_open_cache, "cache", "*2.safetensors"),
}


def corpus_file(name, corpus=CORPUS):
    """The archive of what fuzzing a target has found."""
    return corpus / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.zip"


def prepare(name, folder):
    """Write the folder of a target below ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Prepared(TARGETS[name], SOURCES[TARGETS[name].source](folder / "input"))
