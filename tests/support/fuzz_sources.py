"""Folders that readers accept: one of each kind of checkpoint, of settings, data, tokenizers and caches."""

import gzip
import json

import dtensor_folders
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
from incr_ds.checkpoint.publish import publish
from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.testing.memory import drawn_model
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.synthetic import SyntheticCheckpoint


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


def _model():
    return drawn_model(pico_architecture(num_hidden_layers=1, vocab_size=11), torch.float32)


def _huggingface(folder):
    _model().save_pretrained(folder)
    return folder


def _indexed(folder):
    names = [*_model().state_dict()]
    _huggingface(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _bin(folder):
    _huggingface(folder)
    (folder / "model.safetensors").unlink()
    torch.save(_model().state_dict(), folder / "pytorch_model.bin")
    return folder


def _torch_dist(folder):
    folder.mkdir()
    write_source(folder, SyntheticCheckpoint(pico_architecture(num_hidden_layers=1, vocab_size=11)))
    return folder


def _dtensor(content_of):
    def write(folder):
        folder.mkdir()
        content = content_of(SyntheticCheckpoint(pico_architecture(num_hidden_layers=1, vocab_size=11)))
        groups = content["optimizer"].get("param_to_group_meta", {})
        for name in [*groups][2:]:  # each setting is a record of its own
            del groups[name]
        dtensor_folders.write(folder, content)
        return folder

    return write


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
    "fsdp_dtensor": _dtensor(dtensor_folders.content_of),
    "torch_dcp": _dtensor(dtensor_folders.content_of_torch_dcp),
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
