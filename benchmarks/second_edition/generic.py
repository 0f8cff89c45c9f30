"""Ordinary prompts that the base writes itself, with its own answers: generic.json.

    python benchmarks/second_edition/generic.py DATA

User turns are sampled after the chat template's opening (top-p 0.95) and answered greedily.
DATA is what pack.py wrote. It takes 15 minutes on a CPU. Sampled texts depend on the number of
threads, so another run writes other prompts: the ones that were used are kept beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script

from benchmarks.second_edition.train import Base, Message, Vocabulary, answer, say
from spectr_demo.base.checkpoint import whole_embedded_checkpoint
from spectr_demo.base.prompts import encode, template_opening

FILE = Path(__file__).with_name("generic.json")
ABOUT = (
    "User turns that SmolLM2-135M-Instruct wrote after its own user-turn header, half of them cut "
    "short, each with the base's greedy answer (at most 18 tokens) and how it ended. train: in "
    "training messages. heldout: in test messages only."
)
NUM_SAMPLED, NUM_EACH, NUM_HELDOUT = 456, 200, 40


def is_good(text: str) -> bool:
    """One line of 4 to 160 characters that are mostly letters: no lists of emoji."""
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
    return 4 <= len(text) <= 160 and "\n" not in text and letters / len(text) > 0.8


def sampled_turns(base: Base, vocabulary: Vocabulary, header: list[int]) -> list[str]:
    torch.manual_seed(0)
    message = Message(header, [0] * len(header), [-1], [36])
    texts: list[str] = []
    while len(texts) < NUM_SAMPLED:
        for found in answer(base, None, vocabulary, [message] * 96, batch=96, sample=True):
            text = found["parts"][0]
            if found["ended"][0] != "end":  # cut by the limit: its first sentence, if there is one
                sentence = re.match(r"[^.?!\n]{6,120}[.?!]", text)
                text = sentence.group(0) if sentence else ""
            if is_good(text) and text not in texts:
                texts.append(text)
        say(len(texts), "turns")
    return texts


def chosen_turns(texts: list[str]) -> list[str]:
    """Whole turns and cut ones by turns: a first sentence, or two to five words."""
    rng = random.Random(0)
    texts = [re.sub(r'^[^\w"\'(¿¡]+', "", text).strip() for text in texts]
    texts = [text for text in texts if len(text) > 5]
    whole = [text for text in texts if len(text) <= 130]
    rng.shuffle(whole)
    short = []
    for text in texts:
        sentence = re.match(r"[^.?!\n]{6,60}[.?!]", text)
        if sentence and sentence.group(0) != text:
            short.append(sentence.group(0))
        elif len(words := text.split()) > 6:
            short.append(" ".join(words[: rng.randint(2, 5)]))
    rng.shuffle(short)
    both = zip(whole[:NUM_EACH], short[:NUM_EACH], strict=False)
    return list(dict.fromkeys(text for pair in both for text in pair))


def answered(
    base: Base, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> list[dict[str, str]]:
    prompts = [encode(tokenizer, text) for text in texts]
    messages = [Message(ids, [0] * len(ids), [-1], [18]) for ids in prompts]
    found = answer(base, None, vocabulary, messages, batch=64)
    return [
        {"text": text, "answer": result["parts"][0], "ended": result["ended"][0]}
        for text, result in zip(texts, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    data, device = parser.parse_args().data, torch.device("cpu")
    base = Base(data / "base.safetensors", device)
    vocabulary = Vocabulary(data / "vocabulary.npz", device)
    tokenizer = AutoTokenizer.from_pretrained(whole_embedded_checkpoint(torch.bfloat16))
    texts = chosen_turns(sampled_turns(base, vocabulary, template_opening(tokenizer)))
    turns = answered(base, vocabulary, tokenizer, texts)
    split = {"train": turns[:-NUM_HELDOUT], "heldout": turns[-NUM_HELDOUT:]}
    text = json.dumps({"about": ABOUT, **split}, ensure_ascii=False, indent=1)
    FILE.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
