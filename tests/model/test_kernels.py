"""Attention and layer kernels that a run file asks for: what they change, and what is refused."""

import subprocess
import sys

import pytest
import torch
from test_plain_model import batch, plain
from torch.backends.cuda import cudnn_sdp_enabled

from incr_ds.errors import ConfigError
from incr_ds.model.attention import check_attention, preferred_kernels, transformers_attention
from incr_ds.model.liger import use_liger
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import FAMILIES, pico_architecture

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def priorities():
    return [torch._C._get_sdp_priority_order()[0], cudnn_sdp_enabled()]


def test_cudnn_is_tried_first_where_it_was_asked_for():
    before = priorities()
    with preferred_kernels("cudnn"):
        assert priorities() == [int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION), True]
    assert priorities() == before
    with preferred_kernels("sdpa"):
        assert priorities() == before
    assert [transformers_attention(name) for name in ("sdpa", "cudnn", "eager")] == ["sdpa", "sdpa", "eager"]


def test_cudnn_without_a_cuda_device_is_refused():
    with pytest.raises(
        ConfigError, match="model.attention: cudnn needs a CUDA device, but this run is on 'cpu'; set sdpa"
    ):
        check_attention("cudnn", CPU)
    check_attention("cudnn", CUDA)
    check_attention("sdpa", CPU)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_preference_changes_no_number_where_cudnn_is_not(recompute):
    checkpoint = drawn_checkpoint(pico_architecture("mistral"))
    losses = [
        plain(checkpoint, attention=attention, recompute=recompute)(*batch()).loss for attention in ("sdpa", "cudnn")
    ]
    assert torch.equal(*losses)


def test_liger_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ConfigError, match="liger: its kernels need a CUDA device, but this run is on 'cpu'; set transform"
    ):
        use_liger("llama", CPU)
    with pytest.raises(ConfigError, match="liger-kernel does not support gpt2; it supports .*llama.*qwen3"):
        use_liger("gpt2", CUDA)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ConfigError, match=r"liger-kernel cannot be imported .*pip install 'incr_ds\[liger\]'"):
        use_liger("llama", CUDA)


# Its classes replace transformers' for the whole process.
BUILT = """
import sys, torch
from incr_ds.model.build import check_parameters
from incr_ds.model.layers import LayerFactory
from incr_ds.model.liger import apply_liger
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import FreshWeights
from incr_ds.config.layout import ParallelLayout
from incr_ds.sharding.placement import rank_parameters
from incr_ds.testing.pico import pico_architecture

for family in sys.argv[1:]:
    apply_liger(family)
    architecture = pico_architecture(family)
    factory = LayerFactory(
        architecture, TensorRanks(None, 0, 1), FreshWeights(architecture, 0), torch.float32, torch.device("cpu"), "sdpa"
    )
    model = LanguageModel(factory, range(architecture.num_layers + 3))
    check_parameters(model, rank_parameters(architecture, ParallelLayout(), 0, 0))
    names = {type(module).__name__ for module in model.modules()}
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= names and not {name for name in names if name.endswith("RMSNorm")} - {
        "LigerRMSNorm"
    }, (family, names)
    rotate = sys.modules[type(model.get_submodule("model.layers.0")).__module__].apply_rotary_pos_emb
    assert rotate.__module__.startswith("liger_kernel"), rotate
print("built")
"""


def test_liger_modules_stand_in_every_layer_under_the_same_names():
    done = subprocess.run([sys.executable, "-c", BUILT, *FAMILIES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "built", done.stderr


COMPARED = """
import torch
from incr_ds.model.layers import LayerFactory
from incr_ds.model.liger import use_liger
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import CheckpointWeights
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.pico import pico_architecture

cuda = torch.device("cuda")
checkpoint = drawn_checkpoint(pico_architecture("qwen3"))
ids = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(0)).cuda()

def result():
    factory = LayerFactory(
        checkpoint.architecture, TensorRanks(None, 0, 1), CheckpointWeights(checkpoint), torch.float32, cuda, "sdpa"
    )
    model = LanguageModel(factory, range(checkpoint.architecture.num_layers + 3))
    loss = model(ids[:, :-1], ids[:, 1:]).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

expected = result()
use_liger("qwen3", cuda)
for found, wanted in zip(result(), expected, strict=True):
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_computes_the_same_loss_and_gradients():
    done = subprocess.run([sys.executable, "-c", COMPARED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
