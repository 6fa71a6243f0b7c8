"""Hugging Face Trainer: torchrun --nproc-per-node=2 examples/hf_trainer.py"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hdet.integrations.transformers import attach, loss_of


def data(count, seed):
    """Sequences that count up by a step of their own."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, 32, (count, 1), generator=generator) for _ in range(2))
    sequences = (start + step * torch.arange(12)) % 32
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def main():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=12, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            per_device_train_batch_size=16,
            max_steps=120,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=12,
            logging_steps=40,
            eval_strategy="steps",
            eval_steps=40,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            GPT2LMHeadModel(config), arguments, train_dataset=data(2048, seed=0), eval_dataset=data(64, seed=1)
        )
        attach(trainer, spread=1 / 9, auto_lr=True, probe=loss_of(trainer))
        trainer.train()
        if trainer.is_world_process_zero():
            print(trainer.state.log_history[-2])


if __name__ == "__main__":
    main()
