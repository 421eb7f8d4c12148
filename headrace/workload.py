"""The demo's jobs: chats and raw texts, greedy and sampled, short and long, some with stop strings. Words only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Name three primary colours.",
    "What is photosynthesis?",
    "Write a haiku about a river.",
    "Give me a short recipe for pancakes.",
    "What does a turbine do?",
    "Explain what a queue is to a child.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "What is 7 times 8?",
    "List four animals that live in the sea.",
    "What is the largest planet of the solar system?",
    "Write one sentence about autumn leaves.",
    "How do I boil an egg?",
    "What is the difference between weather and climate?",
    "Give a synonym for 'happy'.",
    "Describe a mountain in one sentence.",
)
TEXTS = (
    "Once upon a time, in a small village by the sea,",
    "The old lighthouse keeper climbed the stairs and",
    "def fibonacci(n):\n",
    "The three most important inventions are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Water flows downhill because",
    "1, 2, 3, 4, 5,",
    "In the year 2050, cities will",
    "The recipe calls for two eggs,",
    "My favourite season is",
    "A computer is a machine that",
    "The dog looked at the cat and",
)
CHAT_WITH_STOP = ("Count from one to ten in words.", "Name five fruits, one on each line.", "What comes after Monday?")
TEXT_WITH_STOP = (
    "Q: What is the boiling point of water?\nA:",
    "Apples, pears, plums,",
    "She opened the door and said:",
)


def jobs(*, chat: bool) -> list[dict[str, Any]]:
    """Thirty-six bodies; a model without a chat template gets every question as plain text.

    Greedy and sampled jobs alternate; every sampled one has a seed, so that a second run says the same.
    """
    asked = [(_chat(text) if chat else _text(text), _params(i)) for i, text in enumerate(QUESTIONS)]
    asked += [(_text(text), _params(i)) for i, text in enumerate(TEXTS)]
    asked += [
        (_chat(text) if chat else _text(text), {**_params(2 * i), "stop": stop})
        for i, (text, stop) in enumerate(zip(CHAT_WITH_STOP, (["six"], ["\n\n"], [".", "!"]), strict=True))
    ]
    asked += [
        (_text(text), {**_params(2 * i), "stop": stop})
        for i, (text, stop) in enumerate(zip(TEXT_WITH_STOP, (["\nQ:"], [" and "], ['"\n']), strict=True))
    ]
    return [{"kind": "generate", "input": given, "params": params} for given, params in asked]


def _chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def _text(text: str) -> dict[str, Any]:
    return {"prompt": text}


def _params(index: int) -> dict[str, Any]:
    """Lengths from 24 to 96 in steps of twelve; every second job is drawn with its own seed."""
    lengths: Sequence[int] = (48, 96, 24, 72, 36, 84, 60)
    params: dict[str, Any] = {"max_tokens": lengths[index % len(lengths)]}
    if index % 2:
        params |= {"temperature": 0.7 + 0.1 * (index % 4), "top_p": 0.95, "seed": 1_000 + index}
    return params
