"""A GPT-2 as Megatron-core's ranks hold it, by the definition of its modules."""

import torch

_NAMES = {
    "ln_1": "self_attention.linear_qkv.layer_norm_",
    "attn.c_attn": "self_attention.linear_qkv.",
    "attn.c_proj": "self_attention.linear_proj.",
    "ln_2": "mlp.linear_fc1.layer_norm_",
    "mlp.c_fc": "mlp.linear_fc1.",
    "mlp.c_proj": "mlp.linear_fc2.",
}
_LOCAL = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_BY_ROWS, _BY_COLUMNS = ("attn.c_attn", "mlp.c_fc"), ("attn.c_proj", "mlp.c_proj")


def layer_parameters(source, state, layer, ranks=1, rank=0):
    """The parameters of a layer on a tensor rank, by the names of Transformer Engine's modules."""
    found = {}
    for module, name in _NAMES.items():
        for end in ("weight", "bias"):
            tensor = source.read(f"transformer.h.{layer}.{module}.{end}", state)
            tensor = tensor.T if tensor.dim() == 2 else tensor
            if module == "attn.c_attn":  # head by head: its query, its key, its value
                tensor = tensor.unflatten(0, (3, source.architecture.sizes["heads"], -1)).transpose(0, 1).flatten(0, 2)
            if module in _BY_ROWS:
                tensor = tensor.chunk(ranks)[rank]
            elif module in _BY_COLUMNS and end == "weight":
                tensor = tensor.chunk(ranks, dim=1)[rank]
            found[name + end] = tensor.contiguous()
    return found


def stacked_parameters(source, state):
    """All parameters, with stacked layers and without padding of the vocabulary."""
    layers = [layer_parameters(source, state, layer) for layer in range(source.architecture.num_layers)]
    return {
        "embedding.word_embeddings.weight": source.read("transformer.wte.weight", state),
        "embedding.position_embeddings.weight": source.read("transformer.wpe.weight", state),
        **{f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]},
        "decoder.final_layernorm.weight": source.read("transformer.ln_f.weight", state),
        "decoder.final_layernorm.bias": source.read("transformer.ln_f.bias", state),
    }


def rank_parameters(source, state, degrees, rank, stage):
    """The parameters of a rank's GPTModel with local modules, whose layers are numbered anew in each stage."""
    ranks, stages = degrees
    count = source.architecture.num_layers // stages
    embedding = source.read("transformer.wte.weight", state).chunk(ranks)[rank]
    found = {}
    if stage == 0:
        found["embedding.word_embeddings.weight"] = embedding
        found["embedding.position_embeddings.weight"] = source.read("transformer.wpe.weight", state)
    for number in range(count):
        for name, tensor in layer_parameters(source, state, stage * count + number, ranks, rank).items():
            found[f"decoder.layers.{number}.{local_name(name)}"] = tensor
    if stage == stages - 1:
        found |= {
            f"decoder.final_layernorm.{e}": source.read(f"transformer.ln_f.{e}", state) for e in ("weight", "bias")
        }
        found |= {"output_layer.weight": embedding} if stages > 1 else {}
    return found


def local_name(name):
    """The name in local modules, where a norm is a module of its own."""
    return next((name.replace(*pair) for pair in _LOCAL.items() if name.startswith(pair[0])), name)
