"""Cases of training over processes, and the same training in one process without this package's engine."""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from incr_ds.arch.freezing import frozen_tensors
from incr_ds.data.slices import slices
from incr_ds.offline.compare import logical_parts
from incr_ds.sharding.joined import joined_parameters
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import MIXTURES, TRAINED_BESIDE, pico_architecture
from incr_ds.testing.runs import pico_run

ROWS, LENGTH, STEPS, RATE = 2, 12, 4, 0.05
END = 5  # a fifth of the tokens in cases with documents


# The teacher runs, at two temperatures, then fades out: the stages stop sending its hidden states.
SCHEDULE = [(0.6, 2.0), (0.3, 1.0), (0.0, 1.0), (0.5, 1.5)]


# A large eps keeps AdamW's step a smooth function of the gradient: a wrong gradient shows, rounding does not.
OPTIMIZER = {"eps": 0.03, "gradient_clipping": 0.5, "weight_decay": 0.2}


@dataclass(frozen=True)
class Case:
    family: str
    tied: bool
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    sequence: int = 1
    accumulation: int = 1
    recompute: bool = False
    divergence: str = "forward_kl"
    z_loss: float = 0.0
    router: float | None = None
    precision: str = "fp32"
    offload: str = "none"
    stages: str | tuple = "even"
    freeze: tuple[str, ...] = ()
    neurons: int = 251  # of a mixture's experts; two tensor ranks have unlike shares of an odd number
    # Prefix of a data set whose facts say that END ends its documents, which are kept apart.
    documents: str = ""

    @property
    def world(self):
        return self.tensor * self.pipeline * self.data

    @property
    def micro_batches(self):
        return self.accumulation * self.data // self.sequence

    def run(self):
        attention = "eager" if self.family == "gemma2" else "sdpa"
        layout = {"tensor_parallel": self.tensor, "pipeline_parallel": self.pipeline, "stages": self.stages}
        return pico_run(
            layout={**layout, "data_parallel": self.data, "zero_stage": self.zero},
            batch={
                "sequence_length": LENGTH,
                "micro_batch_size": ROWS,
                "global_batch_size": ROWS * self.micro_batches,
                "sequence_parallel": self.sequence,
            },
            optimizer={**OPTIMIZER, "offload": self.offload},
            precision=self.precision,
            model={
                "config": "pico",
                "activation_checkpointing": self.recompute,
                "freeze": list(self.freeze),
                "attention": attention,
            },
            distillation={"teacher": "pico", "anneal_steps": STEPS, "divergence": self.divergence},
            loss={"z_loss": self.z_loss, "router": self.router},
            data={"train": [{"prefix": self.documents or "pico"}], "reset_at_document_end": bool(self.documents)},
        )


# Dropout would draw other numbers in another layout; two tensor ranks need an even number of heads.
CHANGES = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "gemma3_text": {"num_key_value_heads": 2},
    "smollm3": {"num_key_value_heads": 2},
    "ministral3": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
}


NEURONS = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}


def of_family(case, tied):
    changes = {"tie_word_embeddings": tied, **CHANGES.get(case.family, {})}
    if case.family in MIXTURES:
        changes[NEURONS[case.family]] = case.neurons
    return small_architecture(case.family, **changes)


def student(case):
    if case.family in (*TRAINED_BESIDE, *MIXTURES):
        return drawn_checkpoint(of_family(case, case.tied), seed=1)
    # Two key-value heads, so that two tensor ranks have one each; FFN 50 and vocabulary 101 split unevenly.
    architecture = pico_architecture(case.family, tied=case.tied, num_key_value_heads=2)
    return drawn_checkpoint(architecture, seed=1)


def teacher(case=None):
    if case is not None and case.family in (*TRAINED_BESIDE, *MIXTURES):
        return drawn_checkpoint(of_family(case, tied=True), seed=2)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return drawn_checkpoint(pico_architecture("llama", **sizes), seed=2)


def micro_batches(count, seed, documents=False):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        ids = torch.randint(0, 101, (ROWS, LENGTH + 1), generator=generator)
        if documents:
            ids[ids < 20] = END
        labels = ids[:, 1:].clone()
        labels[0, : index % 5] = -100  # micro-batches with unlike numbers of valid tokens
        batches.append((ids[:, :-1].contiguous(), labels))
    return batches


def own_part(case, engine, batches):
    """The micro-batches of a rank, or its slices of those that it shares."""
    own = batches[engine.data_parallel_rank // case.sequence :: case.data // case.sequence]
    return list(slices(own, engine.data_parallel_rank % case.sequence, case.sequence))


def train(case):
    """What one rank sees: step results, evaluations between the steps, and its final weights with their bounds."""
    import deepspeed

    from incr_ds.train.engine import build_engine

    weights = student(case)
    engine = build_engine(case.run(), weights.architecture, weights, teacher(case))
    steps, evaluations = [], []
    for step, (alpha, temperature) in enumerate(SCHEDULE):
        mine = own_part(case, engine, micro_batches(case.micro_batches, step, bool(case.documents)))
        # A middle stage of a pipeline would get None.
        batches = iter(mine) if engine.reads_data else None
        steps.append(engine.train_step(batches, learning_rate=RATE, alpha=alpha, temperature=temperature))
        held_out = own_part(case, engine, micro_batches(3 * case.data, 100, bool(case.documents)))
        means = engine.evaluate(iter(held_out), 3 * case.sequence, taught=alpha > 0)
        evaluations.append((means.ce, 0.0 if means.teacher_kl is None else means.teacher_kl))
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=case.zero == 3):
        values = pieces(engine.shards, parameters)
    engine.close()
    return steps, evaluations, values


def pieces(shards, parameters):
    """Copies of the slices of logical tensors that parameters hold, by name and bounds."""
    return {
        (block.name, block.bounds): rows_of(parameter, shard)[block.row : block.row + block.shape[0]].clone()
        for shard, parameter in zip(shards, parameters, strict=True)
        for block in shard.blocks
    }


def assert_pieces(expected, ranks, tolerance=1e-5):
    """The pieces of all ranks are those of ``expected``, and together hold every element of it."""
    near = {"rtol": tolerance, "atol": tolerance}
    seen = dict.fromkeys(expected, 0)
    for held in ranks:
        for (tensor, bounds), value in held.items():
            whole = expected[tensor][tuple(slice(*bound) for bound in bounds)]
            torch.testing.assert_close(value, whole, **near, msg=lambda text, n=tensor: f"{n}: {text}")
            seen[tensor] += value.numel()
    assert all(count >= expected[tensor].numel() for tensor, count in seen.items())


def rows_of(parameter, shard):
    """A parameter as it is, or one that holds experts as a matrix of all their rows."""
    return parameter.detach() if len(shard.blocks) == 1 else parameter.detach().flatten(0, 1)


def reference(case):
    """The same training by transformers and torch alone."""
    model, guide = transformers_model(student(case)), transformers_model(teacher(case))
    architecture = student(case).architecture
    frozen = frozen_tensors(architecture, case.freeze)
    frozen |= {name for name, one in joined_parameters(architecture).items() if one.members[0].name in frozen}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=OPTIMIZER["eps"])
    steps, evaluations = [], []
    for step, (alpha, temperature) in enumerate(SCHEDULE):
        parts = [
            losses(case, model, guide, *batch, alpha, temperature)
            for batch in micro_batches(case.micro_batches, step, bool(case.documents))
        ]
        loss, ce, divergence = (torch.stack(part).mean() for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER["gradient_clipping"])
        optimizer.step()
        steps.append((loss.item(), ce.item(), divergence.item() if alpha else 0.0, norm.item()))
        held_out = micro_batches(3 * case.data, 100, bool(case.documents))
        kl = distance(case, model, guide, held_out) if alpha else 0.0
        evaluations.append((token_mean(model, held_out, case), kl))
    return steps, evaluations, logical_parts(architecture, dict(model.named_parameters()))


def transformers_model(checkpoint):
    config = dict(checkpoint.architecture.config)
    eager = {"experts_implementation": "eager"} if checkpoint.architecture.family.joined else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config), **eager)
    for name, part in logical_parts(checkpoint.architecture, dict(model.named_parameters())).items():
        part.data.copy_(checkpoint.read(name))
    return model


def logits_of(case, model, input_ids):
    """The model's logits [B, S, V]. Documents are run one by one if the case keeps them apart."""
    if not case.documents:
        return model(input_ids).logits
    return torch.stack([torch.cat([model(part[None]).logits[0] for part in documents_of(row)]) for row in input_ids])


def documents_of(row):
    """Cut [S] behind each END."""
    ends = (row == END).nonzero().flatten().tolist()
    bounds = [0, *(end + 1 for end in ends), len(row)]
    return [row[first:stop] for first, stop in zip(bounds, bounds[1:], strict=False) if first < stop]


def losses(case, model, guide, input_ids, labels, alpha, temperature):
    valid = labels.flatten() != -100
    logits = logits_of(case, model, input_ids).flatten(0, 1)[valid]
    with torch.no_grad():
        target = logits_of(case, guide, input_ids).flatten(0, 1)[valid]
    ce = F.cross_entropy(logits, labels.flatten()[valid])
    log_p, log_q = F.log_softmax(logits / temperature, 1), F.log_softmax(target / temperature, 1)
    if case.divergence == "reverse_kl":
        log_p, log_q = log_q, log_p
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    z = logits.logsumexp(1).square().mean()
    loss = (1 - alpha) * ce + alpha * temperature**2 * divergence + case.z_loss * z
    return loss + (router_loss(model, input_ids) * case.router if case.router else 0), ce, divergence


def router_loss(model, input_ids):
    """The mean of transformers' router losses of the layers."""
    found = model(input_ids, output_router_logits=True).router_logits
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    return torch.stack([load_balancing_loss_func((layer,), experts, chosen) for layer in found]).mean()


@torch.no_grad()
def distance(case, model, guide, batches):
    """KL(teacher || student) per token in fp64, at temperature 1 and as forward KL, whatever the run trains with."""
    student, taught = (copy.deepcopy(one).double().eval() for one in (model, guide))
    forward = replace(case, divergence="forward_kl")
    parts = [(losses(forward, student, taught, *batch, 0.5, 1.0)[2], (batch[1] != -100).sum()) for batch in batches]
    return (sum(kl * tokens for kl, tokens in parts) / sum(tokens for _, tokens in parts)).item()


@torch.no_grad()
def token_mean(model, batches, case):
    total = sum(
        F.cross_entropy(logits_of(case, model, ids).flatten(0, 1), labels.flatten(), reduction="sum")
        for ids, labels in batches
    )
    return (total / sum((labels != -100).sum() for _, labels in batches)).item()
