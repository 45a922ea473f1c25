"""Shapes world: captioned scenes, and a checker that reads them back from pixels alone.

There are two worlds. The plain one (plain.py) is the built-in model's: 64 x 64 pixels in seven tasks, the six of
GenEval (single object, two objects, counting, colours, position, colour attribution) and typography. The rich one
(rich.py) is that of the other teachers: 128 x 128 pixels, with textures, up to six objects and two words. The functions
of this package are the plain world's; those of the other are in `RICH`.

meaning.py says what captions mean, grammar.py has captions and splits, figures.py and layout.py say how scenes look,
world.py draws and judges them. folders.py finds the world that a model draws.
"""

from edgeprune.shapes.figures import BACKGROUND, COLOURS, SHAPES, TEXTURES, Pixels
from edgeprune.shapes.folders import save_world, world_of
from edgeprune.shapes.grammar import TEMPLATES, Grammar, Task
from edgeprune.shapes.meaning import PLACES, RELATIONS, Meaning, Prompt, Thing
from edgeprune.shapes.plain import NUMBERS, PLAIN, SEEN
from edgeprune.shapes.plain_reader import GLYPHS
from edgeprune.shapes.reading import Seen
from edgeprune.shapes.rich import RICH
from edgeprune.shapes.world import World, score

WORLDS = {world.size: world for world in (PLAIN, RICH)}
"""The worlds by the side of their scenes in pixels."""

SIZE, TASKS = PLAIN.size, PLAIN.grammar.names
check, render, see, training_scenes = PLAIN.check, PLAIN.render, PLAIN.see, PLAIN.training_scenes
evaluation_prompts, parse = PLAIN.grammar.evaluation_prompts, PLAIN.grammar.parse
prompts, prompts_of, split = PLAIN.grammar.prompts, PLAIN.grammar.prompts_of, PLAIN.grammar.split
task_means = PLAIN.task_means

__all__ = [
    "BACKGROUND",
    "COLOURS",
    "GLYPHS",
    "NUMBERS",
    "PLACES",
    "PLAIN",
    "RELATIONS",
    "RICH",
    "SEEN",
    "SHAPES",
    "SIZE",
    "TASKS",
    "TEMPLATES",
    "TEXTURES",
    "WORLDS",
    "Grammar",
    "Meaning",
    "Pixels",
    "Prompt",
    "Seen",
    "Task",
    "Thing",
    "World",
    "check",
    "evaluation_prompts",
    "parse",
    "prompts",
    "prompts_of",
    "render",
    "save_world",
    "score",
    "see",
    "split",
    "task_means",
    "training_scenes",
    "world_of",
]
