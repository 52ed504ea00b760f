"""Trains the demo model from nothing, on the CPU: a tokenizer, then a small Llama, on sentences made by texts.py.

    OMP_NUM_THREADS=1 python -m jobs.demo.train            # writes jobs/demo/model
    python -m jobs.demo.train --measure                    # held-out accuracy of the model that is there

The model reads `<s>sentence\\n=` and continues with the value's normal form and `</s>`.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from jobs.demo.texts import KINDS, Row, make_row

MODEL_FOLDER = Path(__file__).parent / "model"
PROMPT = "{text}\n="
"""As the task's template `{{ sentence }}\\n=` renders it."""
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BATCH_ROWS = 256
POOL_BATCHES = 8
MICRO_ROWS = 64
"""Rows that go through the model at a time: their activations stay in a core's cache, which halves the time."""
IGNORED = -100
Model = Any  # a LlamaForCausalLM; its declared types do not let it generate
# A digit is a token, so that a number is read and written digit by digit; otherwise words, spaces and single signs.
WORD_PATTERN = r" ?\p{L}+|\p{N}|[^\p{L}\p{N}\s]|\s"


def train_tokenizer(rng: Random, vocab_size: int, num_rows: int = 60_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, the usual words of the sentences are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rows = (make_row(rng) for _ in range(num_rows))
    # One in three in capitals, more than the sentences are, so that words in capitals are tokens too.
    prompts = (row.text.upper() if i % 3 == 0 else row.text for i, row in enumerate(rows))
    texts = (PROMPT.format(text=text) for text in prompts)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Four layers with grouped-query attention and tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels, [BATCH_ROWS, longest row], int64, without end; labels are of the answer alone.

    Rows are made as they are needed and never repeat. Rows of like length share a batch.
    """
    fast, eos, pad = tokenizer.backend_tokenizer, tokenizer.eos_token_id, tokenizer.pad_token_id
    while True:
        rows = [make_row(rng) for _ in range(BATCH_ROWS * POOL_BATCHES)]
        prompts = fast.encode_batch_fast([PROMPT.format(text=row.text) for row in rows])
        answers = fast.encode_batch_fast([row.expected for row in rows], add_special_tokens=False)
        pairs = sorted(((p.ids, [*a.ids, eos]) for p, a in zip(prompts, answers, strict=True)), key=lambda x: len(x[0]))
        starts = list(range(0, len(pairs), BATCH_ROWS))
        rng.shuffle(starts)
        for start in starts:
            chosen = pairs[start : start + BATCH_ROWS]
            longest = max(len(p) + len(a) for p, a in chosen)
            ids = torch.full((len(chosen), longest), pad)
            labels = torch.full((len(chosen), longest), IGNORED)
            for i, (p, a) in enumerate(chosen):
                ids[i, : len(p) + len(a)] = torch.tensor(p + a)
                labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
            yield ids, labels


def answer_loss(model: Model, ids: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of the answers' tokens; the vocabulary is multiplied at their positions only."""
    # Padding is on the right and attention is causal: no row reads it, and a mask would only cost time.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to a hundredth of the peak."""
    if step < 100:
        return peak * (step + 1) / 100
    progress = (step - 100) / max(1, num_steps - 100)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(model: Model, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Trains in place and saves what there is to `args.out` at every measurement."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    stream = batches(tokenizer, Random(args.seed + 1))
    probe = held_out_rows(400, args.seed + 2)
    started, total = time.monotonic(), 0.0
    for step in range(args.steps):
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate(step, args.steps, args.lr)
        ids, labels = next(stream)
        num_answer_tokens = int((labels != IGNORED).sum())
        optimizer.zero_grad()
        for micro_ids, micro_labels in zip(ids.split(MICRO_ROWS), labels.split(MICRO_ROWS), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = answer_loss(model, micro_ids, micro_labels) / num_answer_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {total / 50:.4f} {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
        last = step + 1 == (args.last_step or args.steps)
        if (step + 1) % args.measure_every == 0 or last:
            print_accuracy(*measure(model, tokenizer, probe))
            save(model, tokenizer, args.out)
        if last:
            break


def save(model: Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint in bfloat16; the model in memory stays float32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def held_out_rows(num_rows: int, seed: int) -> list[Row]:
    """Rows whose values are not in training."""
    rng = Random(seed)
    return [make_row(rng, keep_held_out=True) for _ in range(num_rows)]


@torch.inference_mode()
def answers(model: Model, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[str]:
    """The model's greedy answers, by transformers."""
    found: list[str] = []
    for start in range(0, len(texts), 250):
        prompts = [PROMPT.format(text=text) for text in texts[start : start + 250]]
        # `tokenizer(prompts, padding=True)` would leave padding switched on in the tokenizer that trains and is saved.
        ids = tokenizer(prompts, return_token_type_ids=False)
        inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        found += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def measure(
    model: Model, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> tuple[dict[str, tuple[int, int]], list[tuple[Row, str]]]:
    """By kind: how many answers equal the expected text, of how many; and the rows that were answered wrongly."""
    model.eval()
    right, count, wrong = Counter[str](), Counter[str](), []
    for row, answer in zip(rows, answers(model, tokenizer, [row.text for row in rows]), strict=True):
        count[row.kind] += 1
        right[row.kind] += answer == row.expected
        if answer != row.expected:
            wrong.append((row, answer))
    model.train()
    return {kind: (right[kind], count[kind]) for kind in KINDS}, wrong


def print_accuracy(by_kind: dict[str, tuple[int, int]], wrong: list[tuple[Row, str]]) -> None:
    for row, answer in wrong[:10]:
        print(f"  wrong: {row.text!r} expected {row.expected!r}, answered {answer!r}")
    right, count = (sum(values) for values in zip(*by_kind.values(), strict=True))
    kinds = ", ".join(f"{kind} {r}/{n}" for kind, (r, n) in by_kind.items())
    print(f"held-out exact match {right}/{count} = {right / count:.4f} ({kinds})", flush=True)


def begin(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A new tokenizer and a model with random weights, or with --resume those of an earlier run; in float32."""
    # The eager attention takes half the time of the fused one, whose backward is slow on rows this short.
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32, attn_implementation="eager")
        return tokenizer, model.train()
    tokenizer = train_tokenizer(Random(args.seed), args.vocab_size)
    config = model_config(tokenizer)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return tokenizer, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--last-step", type=int, help="end here, with the learning rate planned for all steps")
    parser.add_argument("--resume", action="store_true", help="begin with the weights and the tokenizer in --out")
    parser.add_argument("--measure-every", type=int, default=200, help="steps between measurements and checkpoints")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--measure", action="store_true", help="measure the model in --out on 10,000 held-out rows")
    args = parser.parse_args()
    if args.measure:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        rows = held_out_rows(10_000, args.seed + 3)
        for dtype in (torch.bfloat16, torch.float32):
            print(dtype)
            print_accuracy(*measure(AutoModelForCausalLM.from_pretrained(args.out, dtype=dtype), tokenizer, rows))
        return
    torch.manual_seed(args.seed)
    tokenizer, model = begin(args)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary",
        flush=True,
    )
    train(model, tokenizer, args)


if __name__ == "__main__":
    main()
