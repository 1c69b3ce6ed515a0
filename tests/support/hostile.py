"""Hostile input: folders and files that an attacker could hand over, and a process that opens them under watch."""

import importlib
import json
import os
import pathlib
import pickle
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sources import write_synthetic

from incr_ds.checkpoint.publish import publish
from incr_ds.errors import ConfigError, IncrError
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.pico import pico_architecture

LONGEST, MOST_MEMORY = 20, 1 << 30  # seconds and bytes that one case may take
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
LAYOUTS = {
    "zero-1": {"data_parallel": 2},
    "zero-3": {"data_parallel": 2, "zero_stage": 3},
    "universal": {"format": "universal"},
    "megatron": {"modules": "megatron-deepspeed"},
}
# Files that only DeepSpeed reads, behind the trainer's own loader.
NOT_READ = {
    ("universal", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ("universal", "optimizer_state.pt"),
    ("zero-3", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
}


@dataclass(frozen=True)
class Attack:
    """One case: ``path`` is opened as a ``kind`` of input (see OPENERS). It may be ``harmless`` if nothing of it runs."""

    name: str
    kind: str
    path: Path
    harmless: bool = False


class Call:
    """Unpickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(canary):
    """Objects that would leave a file ``canary`` when they are unpickled."""
    script = canary.with_suffix(".py")
    script.write_text(f"open({str(canary)!r}, 'w').close()\n")
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "touch": Call(pathlib.PosixPath.touch, Path(canary)),
        "run_path": Call(runpy.run_path, str(script)),
        "import": Call(importlib.import_module, "antigravity"),
        "partial": Call(Call, partial(os.system, f"touch {canary}")),
        "nested load": Call(torch.load, str(script)),
        "numpy object": np.array([Call(os.system, f"touch {canary}")], dtype=object),
    }


def write_sources(folder):
    """One small checkpoint of each kind. Returns their folders by name, without manifests."""
    found = {}
    for name, layout in LAYOUTS.items():
        (made := folder / name).mkdir(parents=True)
        write_synthetic(made, pico_architecture(num_hidden_layers=1, vocab_size=11), **layout)
        found[name] = made / "source"
        (found[name] / "manifest.json").unlink()
    found["huggingface"] = folder / "huggingface"
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(found["huggingface"])
    found["bin"] = folder / "bin"
    shutil.copytree(found["huggingface"], found["bin"])
    torch.save(drawn_model(small_architecture("llama"), torch.float32).state_dict(), found["bin"] / "pytorch_model.bin")
    (found["bin"] / "model.safetensors").unlink()
    return found


def copied(source, to):
    shutil.copytree(source, to, symlinks=True)
    return to


def pickle_attacks(sources, folder, canary):
    """A payload in every pickled file, in the archive of today and in both forms of old."""
    for kind, source in sources.items():
        # Of files with the same name, as a universal checkpoint has for each tensor, one is enough.
        for path in {path.name: path for path in sorted([*source.rglob("*.pt"), *source.rglob("*.bin")])}.values():
            content = torch.load(path, weights_only=False)
            for number, (name, payload) in enumerate(payloads(canary).items()):
                to = copied(source, folder / f"{kind}-{path.name}-{number}")
                poisoned = {**content, "payload": payload} if isinstance(content, dict) else [content, payload]
                target = to / path.relative_to(source)
                if number % 3 == 2:
                    target.write_bytes(pickle.dumps(poisoned))
                else:
                    torch.save(poisoned, target, _use_new_zipfile_serialization=number % 3 == 0)
                yield Attack(f"{name} in {path.name} ({kind})", "source", to, harmless=(kind, path.name) in NOT_READ)


def archive_attacks(sources, folder):
    """Archives whose records are not what their tensors state."""
    source = sources["zero-1"]
    path = next(iter(sorted(source.rglob("*model_states.pt"))))
    for number, (name, change) in enumerate(ARCHIVES.items()):
        to = copied(source, folder / f"archive-{number}")
        rewrite(to / path.relative_to(source), change)
        yield Attack(f"{name} ({path.name})", "source", to)
    for number, (name, tensor) in enumerate(_tensors().items()):
        to = copied(source, folder / f"tensor-{number}")
        target = to / path.relative_to(source)
        content = torch.load(target, weights_only=False)
        key = next(iter(content["module"]))
        content["module"][key] = tensor
        torch.save(content, target)
        yield Attack(f"{name} ({path.name})", "source", to)


def rewrite(path, change):
    """Write an archive again, with each record (name, content) as ``change`` gives it: (name, content, compression)."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            for changed_name, changed, compression in change(name, content):
                archive.writestr(changed_name, changed, compression)


def _is_data(name):
    return "/data/" in name


ARCHIVES = {
    "storage that is too short": lambda n, c: [(n, c[: len(c) // 2] if _is_data(n) else c, zipfile.ZIP_STORED)],
    "compressed records": lambda n, c: [(n, c, zipfile.ZIP_DEFLATED)],
    "decompression bomb": lambda n, c: [(n, bytes(300 << 20) if _is_data(n) else c, zipfile.ZIP_DEFLATED)],
    "bomb for a pickle": lambda n, c: [(n, bytes(300 << 20) if n.endswith("data.pkl") else c, zipfile.ZIP_DEFLATED)],
    "archive in the archive": lambda n, c: [(n, b"PK\x03\x04" + c if _is_data(n) else c, zipfile.ZIP_STORED)],
    "no pickle": lambda n, c: [] if n.endswith("data.pkl") else [(n, c, zipfile.ZIP_STORED)],
    "names that leave the archive": lambda n, c: [
        (n, c, 0),
        (f"../../outside-{n}", c[:10], 0),
        (f"/outside-{n}", c, 0),
    ],
    "1,000 more records each": lambda n, c: [(n, c, 0), *((f"{n}.more{i}", b"", 0) for i in range(1000))],
}


class Rebuilt:
    """Unpickles as torch's call that makes a tensor of a storage, with any size, stride and offset."""

    def __init__(self, offset, size, stride):
        self.arguments = torch.UntypedStorage(64), offset, size, stride

    def __reduce__(self):
        storage, offset, size, stride = self.arguments
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, {})


def _tensors():
    return {
        "tensor beyond its storage": Rebuilt(0, (11, 24), (24, 1)),
        "negative offset": Rebuilt(-4, (2, 2), (2, 1)),
        "offset beyond its storage": Rebuilt(1 << 40, (2, 2), (2, 1)),
        "2 to the 50 elements of stride 0": Rebuilt(0, (1 << 25, 1 << 25), (0, 0)),
        "negative stride": Rebuilt(8, (2, 2), (-2, -1)),
        "negative size": Rebuilt(0, (-1, 4), (4, 1)),
        "product of sizes beyond 64 bits": Rebuilt(0, (1 << 40, 1 << 40), (0, 0)),
    }


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(shape, first, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, stop]}


EMBEDDING = "model.embed_tokens.weight"
SAFETENSORS = {
    "header of 2 to the 63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "header that is longer than the file": struct.pack("<Q", 10_000) + b"{}",
    "no header": b"",
    "header that is a list": safetensors_bytes(b"[]"),
    "header of 100,000 brackets": safetensors_bytes(b"[" * 100_000),
    "offsets beyond the file": safetensors_bytes({EMBEDDING: _entry([2, 2], 0, 16)}),
    "offsets backwards": safetensors_bytes({EMBEDDING: _entry([2, 2], 16, 0)}, bytes(16)),
    "negative offsets": safetensors_bytes({EMBEDDING: _entry([2, 2], -16, 0)}, bytes(16)),
    "tensors that overlap": safetensors_bytes(
        {EMBEDDING: _entry([2, 2], 0, 16), "b": _entry([2, 2], 8, 24)}, bytes(24)
    ),
    "shape of 2 to the 80 elements": safetensors_bytes({EMBEDDING: _entry([1 << 40, 1 << 40], 0, 16)}, bytes(16)),
    "negative shape": safetensors_bytes({EMBEDDING: _entry([-2, -2], 0, 16)}, bytes(16)),
    "a type of nobody": safetensors_bytes({EMBEDDING: _entry([2, 2], 0, 16, "X32")}, bytes(16)),
    "a name twice": safetensors_bytes(
        b'{"%s": {"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}, "%s": {"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
        % (EMBEDDING.encode(), EMBEDDING.encode()),
        bytes(16),
    ),
    "a pickle": pickle.dumps(Call(os.system, "true")),
}
WEIGHT_MAPS = {
    "parent folder": "../outside.safetensors",
    "absolute path": "/etc/passwd",
    "folder and back": "a/../../outside.safetensors",
    "NUL": "a\0b.safetensors",
    "a number": 5,
    "a list": ["model.safetensors"],
    "a missing file": "missing.safetensors",
    "backslashes": "..\\outside.safetensors",
}


def huggingface_attacks(sources, folder):
    source = sources["huggingface"]
    for number, (name, content) in enumerate(SAFETENSORS.items()):
        to = copied(source, folder / f"safetensors-{number}")
        (to / "model.safetensors").write_bytes(content)
        yield Attack(f"safetensors: {name}", "source", to)
    shutil.copyfile(source / "model.safetensors", folder / "outside.safetensors")
    for number, (name, file) in enumerate(WEIGHT_MAPS.items()):
        to = copied(source, folder / f"map-{number}")
        (to / "model.safetensors").unlink()
        (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: file}}))
        yield Attack(f"weight map: {name}", "source", to)
    for number, (name, make) in enumerate(LINKS.items()):
        to = copied(source, folder / f"link-{number}")
        (to / "model.safetensors").unlink()
        make(to / "model.safetensors")
        yield Attack(f"weights: {name}", "source", to)


LINKS = {
    "a pipe": os.mkfifo,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a folder": lambda path: path.symlink_to("/etc"),
    "a link to a text": lambda path: path.symlink_to("/etc/passwd"),
}
CONFIGS = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": -1},
    "vocabulary of 2 to the 62": {"vocab_size": 1 << 62},
    "hidden size of 2 to the 62": {"hidden_size": 1 << 62},
    "a million heads": {"num_attention_heads": 10**6},
    "code of its own": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    "code of its own and no type": {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
    "a type that is a path": {"model_type": "../../evil"},
    "numbers that are text": {"hidden_size": "__import__('os').system('true')"},
    "rotary positions from elsewhere": {"rope_scaling": {"type": "evil", "factor": 1e308}},
    "an activation from elsewhere": {"hidden_act": "os.system"},
}


def config_attacks(sources, folder, canary):
    for kind in ("huggingface", "zero-1"):
        source = sources[kind]
        where = next(iter(sorted(source.rglob("config.json"))))
        for number, (name, change) in enumerate(CONFIGS.items()):
            to = copied(source, folder / f"config-{kind}-{number}")
            target = to / where.relative_to(source)
            target.write_text(json.dumps({**json.loads(where.read_text()), **change}))
            for path in (to / "evil.py", target.with_name("evil.py")):
                path.write_text(f"open({str(canary)!r}, 'w').close()\n")
            yield Attack(f"config: {name} ({kind})", "source", to)
        for number, (name, content) in enumerate(JSON_TEXTS.items()):
            to = copied(source, folder / f"json-{kind}-{number}")
            (to / where.relative_to(source)).write_bytes(content)
            yield Attack(f"config: {name} ({kind})", "source", to)


JSON_TEXTS = {
    "100,000 brackets": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "17 MB": b'{"a": "' + b"a" * (17 << 20) + b'"}',
    "a number of a million digits": b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
    "NaN": b'{"hidden_size": NaN}',
    "not UTF-8": b'{"\xff": 1}',
}
TAGS = ("../huggingface", "/etc", "a/../..", ".", "", "a\0b", "\x1b[2J", "x" * 100_000)
MANIFESTS = {
    "a file elsewhere": {"files": {"../outside": {"bytes": 1, "xxh3": "0"}}},
    "an absolute path": {"files": {"/etc/passwd": {"bytes": 1, "xxh3": "0"}}},
    "100,000 files": {"files": {f"f{number}": {"bytes": 1, "xxh3": "0"} for number in range(100_000)}},
    "files that are a list": {"files": ["a"]},
    "sizes that are text": {"files": {"config.json": {"bytes": "many", "xxh3": 5}}},
    "nothing": {},
}


def folder_attacks(sources, folder):
    source = sources["zero-1"]
    for number, tag in enumerate(TAGS):
        to = copied(source, folder / f"tag-{number}")
        (to / "latest").write_text(tag)
        yield Attack(f"latest: {tag[:20]!r}", "source", to)
    for number, (name, content) in enumerate(MANIFESTS.items()):
        to = copied(source, folder / f"manifest-{number}")
        (to / "manifest.json").write_text(json.dumps(content))
        yield Attack(f"manifest: {name}", "source", to)
    for number, (name, make) in enumerate(LINKS.items()):
        to = copied(source, folder / f"state-link-{number}")
        target = next(iter(sorted(to.rglob("*optim_states.pt"))))
        target.unlink()
        make(target)
        yield Attack(f"optimizer file: {name}", "source", to)


YAML_TEXTS = {
    "a tag that calls": "output: !!python/object/apply:os.system ['true']",
    "a tag that makes": "output: !!python/object/new:os.system ['true']",
    "a tag that names": "output: !!python/name:os.system",
    "a module": "output: !!python/module:os",
    "binary": "output: !!binary aGk=",
    "a tag of nobody": "output: !evil {a: 1}",
    "a billion laughs": "\n".join(
        ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    ),
    "a value that holds itself": "output: &a [*a]",
    "50,000 brackets": "[" * 50_000,
    "a merge key": "a: &a {b: 1}\noutput: {<<: *a}",
    "a key that is a list": "? [a, b]\n: 1",
    "a number of a million digits": "seed: " + "9" * 1_000_000,
    "17 MB": "output: " + "a" * (17 << 20),
    "many documents": "---\na: 1\n" * 1000,
    "escapes of a terminal": 'output: "\\e[2J\\e]0;evil\\a"\nevil: 1',
}


def settings_attacks(folder):
    for number, (name, text) in enumerate(YAML_TEXTS.items()):
        path = folder / f"settings-{number}.yaml"
        path.write_text(text)
        for kind in ("run file", "recipe", "study"):
            yield Attack(f"{kind}: {name}", kind, path)


def _index(code, sequences, starts, rest=b""):
    return b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, sequences, starts) + rest


INDEXES = {
    "2 to the 60 documents": _index(8, 1 << 60, 1 << 60),
    "a size that overflows": _index(8, (1 << 64) // 12 + 1, 0),
    "a type of nobody": _index(200, 1, 2, bytes(28)),
    "lengths below zero": _index(8, 1, 2, struct.pack("<iqqq", -5, 0, 0, 1)),
    "a place beyond the file": _index(8, 1, 2, struct.pack("<iqqq", 5, 1 << 50, 0, 1)),
    "a place before the file": _index(8, 1, 2, struct.pack("<iqqq", 5, -8, 0, 1)),
    "documents in no order": _index(8, 1, 2, struct.pack("<iqqq", 5, 0, 1, 0)),
    "no magic": b"evil" * 20,
}
TOKENIZERS = {
    "tokenizer.json": {
        "100,000 brackets": b"[" * 100_000,
        "no model": b'{"version": "1.0"}',
        "a model of nobody": b'{"version": "1.0", "model": {"type": "evil", "vocab": {}}}',
        "ids of 2 to the 40": b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 1099511627776}}}',
        "a pickle": pickle.dumps(Call(os.system, "true")),
    },
    "tokenizer_config.json": {
        "code of its own": b'{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}',
        "a class that is a path": b'{"tokenizer_class": "../../evil"}',
        "a template that reads files": b'{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ cycler }}"}',
    },
    "tokenizer.model": {
        "random bytes": bytes(range(256)) * 40,
        "a length of 2 to the 63": b"\x0a" + b"\xff" * 9 + b"\x7f",
        "nothing": b"",
    },
}


def data_attacks(folder, canary):
    for number, (name, content) in enumerate(INDEXES.items()):
        prefix = folder / f"data-{number}"
        prefix.with_suffix(".idx").write_bytes(content)
        prefix.with_suffix(".bin").write_bytes(bytes(40))
        yield Attack(f"index: {name}", "data", prefix)
    for file, contents in TOKENIZERS.items():
        for number, (name, content) in enumerate(contents.items()):
            to = folder / f"{file}-{number}"
            to.mkdir()
            (to / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
            (to / file).write_bytes(content)
            yield Attack(f"{file}: {name}", "tokenizer", to / file if file == "tokenizer.model" else to)
    cache = folder / "index_cache"
    with publish(cache, "index", {}) as work:
        objects = np.array([Call(os.system, f"touch {canary}")], dtype=object)
        np.save(work / "objects.npy", objects, allow_pickle=True)
    yield Attack("index cache: an array of objects", "index cache", cache)


# What opens each kind of input. Each reads all that it opens.


def _open_source(path):
    from incr_ds.checkpoint.integrity import check_folder, open_described

    checkpoint = open_described(path)
    check_folder(path, checkpoint)
    list(checkpoint.self_check())
    for spec in checkpoint.architecture.stored:
        for state in checkpoint.facts.states:
            checkpoint.read(spec.name, state)


def _open_settings(kind):
    def opened(path):
        from incr_ds.config import fields, growth, study, training

        settings = {"run file": training.RunSettings, "recipe": growth.GrowthRecipe, "study": study.StudySettings}
        fields.load_settings(path, settings[kind])

    return opened


def _open_data(path):
    from incr_ds.data.index_file import open_index

    open_index(str(path)).check()


def _open_tokenizer(path):
    from incr_ds.data.tokenizer import open_encoder

    open_encoder(str(path)).encode(["some text"])


def _open_index_cache(path):
    from incr_ds.data.sample_index import is_whole

    if not is_whole(path):
        raise ConfigError(f"{path}: built again")


OPENERS = {
    "source": _open_source,
    "data": _open_data,
    "tokenizer": _open_tokenizer,
    "index cache": _open_index_cache,
    **{kind: _open_settings(kind) for kind in ("run file", "recipe", "study")},
}


def watch(attacks_file):
    """Open each case of a JSON file, and print a JSON line before and after it. Runs in a process of its own."""
    seen = []
    sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(FORBIDDEN) else None)
    for opener in OPENERS.values():  # what is imported here does not count
        try:
            opener(Path("/nonexistent"))
        except (IncrError, OSError):
            pass
    for number, (kind, path) in enumerate(json.loads(Path(attacks_file).read_text())):
        print(json.dumps({"number": number}), flush=True)
        seen.clear()
        signal.alarm(LONGEST)
        began = time.monotonic()
        try:
            OPENERS[kind](Path(path))
            said, error = "", "opened"
        except IncrError as problem:
            said, error = str(problem), "refused"
        except Exception as problem:  # a defect; the test fails with it
            said, error = repr(problem), "another error"
        signal.alarm(0)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        outcome = {
            "outcome": error,
            "said": said,
            "seconds": time.monotonic() - began,
            "memory": used,
            "seen": list(seen),
        }
        print(json.dumps({"number": number, **outcome}), flush=True)


if __name__ == "__main__":
    watch(sys.argv[1])
