"""Prompts that the drafter's constants are fitted on: none of them is used to measure it."""

import random
import re
from pydoc_data.topics import topics

from benchmarks.builtin import builtin_tasks
from benchmarks.tasks import Task

_PER_KIND = 20
# What end_to_end measures on are the first tasks of each category.
_FIRST_CODE_TASK = 40

_CHAT = """Write a short story about a lighthouse keeper who finds a letter.
Explain how a refrigerator works.
Give me a recipe for lentil soup, with the steps numbered.
What are the main causes of the French Revolution?
How do vaccines protect people?
Plan a three-day trip to Lisbon.
Write an email to my landlord about a broken heater.
Compare cats and dogs as pets.
What is the difference between a virus and a bacterium?
Explain supply and demand to a child.
Write a poem about the sea in winter.
How do I learn to play the guitar?
List ten ideas for a science fair project.
What is inflation and how is it measured?
Describe the water cycle.
Who was Marie Curie and why is she famous?
Write a product description for a wooden desk lamp.
How can I sleep better?
Write a function in Python that reverses a linked list, and explain it.
Write a SQL query that finds the second highest salary.""".splitlines()


def fitting_tasks() -> list[Task]:
    """All of them: summaries, questions on a text, rewriting, translation, code, sums, chat."""
    rng = random.Random(1)
    # Backwards: the measured quoting and editing tasks are the first ones.
    names = sorted(topics, reverse=True)
    texts = [re.sub(r"\n{3,}", "\n\n", topics[name]).strip()[:2800] for name in names]
    texts = [text for text in texts if len(text) > 1000]
    tasks: list[Task] = []

    def add(category: str, asked: list[str]) -> None:
        tasks.extend(Task(f"{category}/{i}", category, text) for i, text in enumerate(asked[:_PER_KIND]))

    about = "Using only this text, explain what it is about, quoting the sentences that say so."
    add("summary", [f"Summarize the following text.\n\n{text}" for text in texts])
    add("questions", [f"{text}\n\n{about}" for text in texts[_PER_KIND:]])
    plain = "Rewrite the following text in plain, simple English. Keep all of its facts."
    add("rewriting", [f"{plain}\n\n{text[:1000]}" for text in texts[::-1]])
    add("translation", [f"Translate the following text into French.\n\n{text[:600]}" for text in texts[::2]])
    code = [task for task in builtin_tasks() if task.category == "code_infile"][_FIRST_CODE_TASK:]
    add("code", [task.text for task in code])
    add("sums", [_sum(rng) for _ in range(_PER_KIND)])
    add("chat", _CHAT)
    return tasks


def _sum(rng: random.Random) -> str:
    a, b, c, d = rng.randint(3, 40), rng.randint(2, 12), rng.randint(2, 30), rng.randint(2, 9)
    return rng.choice(
        (
            f"A farmer has {a} crates with {b * c} apples each. He sells {d} crates and gives away {b} apples "
            "from each of the others. How many apples are left? Think step by step.",
            f"A train travels {a * 10} km in {b} hours, and then {c * 10} km in {d} hours. What is its average "
            "speed? Show the steps.",
            f"Anna is {a} years old. Ben is {b} years older than Anna, and Clara is {d} years younger than Ben. "
            "What is the sum of their ages? Show each step.",
            f"A shop sells pens at ${b} and notebooks at ${d}. Tom buys {a} pens and {c} notebooks and pays with "
            f"${b * a + d * c + 50}. How much change does he get? Explain each step.",
        )
    )
