"""Child processes of test_trainer: transformers' own Trainer under DeepSpeed."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from incr_ds.testing.memory import drawn_model, small_architecture


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        tokens = (torch.arange(12) * 7 + number) % 101
        return {"input_ids": tokens, "labels": tokens}


def train(folder, stage):
    """Two steps with the Trainer, which saves checkpoint-2; rank 0 leaves the module's weights in live.pt."""
    import deepspeed
    from transformers import Trainer, TrainingArguments

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=1,
        deepspeed=config,
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
        logging_strategy="no",
    )
    model = drawn_model(small_architecture("llama", tie_word_embeddings=True), torch.float32)
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    return [path.name for path in Path(folder).iterdir()]
