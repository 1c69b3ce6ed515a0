"""What is fuzzed: for each reader a folder that it accepts, the file in it that changes, and the first contents of that file."""

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
import torch
from fuzz_sources import SOURCES

from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import IncrError

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
    "fsdp_dtensor metadata": Target(_source, "fsdp_dtensor", "iter_*/.metadata"),
    "fsdp_dtensor shard": Target(_source, "fsdp_dtensor", "iter_*/*.distcp"),
    "torch_dcp metadata": Target(_source, "torch_dcp", "iter_*/.metadata"),
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
