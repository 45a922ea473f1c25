"""Shapes world: captioned 64 x 64 scenes, and a checker that reads them back from pixels alone.

Seven tasks: the six of GenEval (single object, two objects, counting, colours, position, colour attribution) and
typography. captions.py says what each prompt means, renderer.py draws scenes, checker.py judges images.
"""

from edgeprune.shapes.captions import (
    COLOURS,
    GLYPHS,
    NUMBERS,
    PLACES,
    RELATIONS,
    SHAPES,
    TASKS,
    TEMPLATES,
    Meaning,
    Prompt,
    Thing,
    evaluation_prompts,
    parse,
    prompts,
    prompts_of,
)
from edgeprune.shapes.checker import Seen, check, score, see, task_means
from edgeprune.shapes.renderer import BACKGROUND, SEEN, SIZE, Pixels, render, training_scenes

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "GLYPHS",
    "NUMBERS",
    "PLACES",
    "RELATIONS",
    "SEEN",
    "SHAPES",
    "SIZE",
    "TASKS",
    "TEMPLATES",
    "Meaning",
    "Pixels",
    "Prompt",
    "Seen",
    "Thing",
    "check",
    "evaluation_prompts",
    "parse",
    "prompts",
    "prompts_of",
    "render",
    "score",
    "see",
    "task_means",
    "training_scenes",
]
