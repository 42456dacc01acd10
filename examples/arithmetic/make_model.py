"""Makes a tiny model with random weights and its character tokenizer, in Hugging Face's layout.

    python examples/arithmetic/make_model.py --out runs/demo/model

Qwen3's architecture with 124,288 parameters; sixteen tokens: ten digits, `+`, `=`, end of line (which ends an
answer), padding and two spare ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789+=\n"
PAD = "<pad>"
VOCABULARY_SIZE = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; the newline is the end of sequence."""
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)} | {PAD: len(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="\n", pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(*, hidden: int, layers: int, heads: int, seed: int) -> Qwen3ForCausalLM:
    """Random weights in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=CHARACTERS.index("\n"),
        pad_token_id=len(CHARACTERS),
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = make_model(hidden=args.hidden, layers=args.layers, heads=args.heads, seed=args.seed)
    model.save_pretrained(args.out)
    make_tokenizer().save_pretrained(args.out)
    print(f"wrote {sum(p.numel() for p in model.parameters()):,} parameters and a tokenizer to {args.out}")


if __name__ == "__main__":
    main()
