"""Writes a tokenizer as OpenVINO IR (`openvino_tokenizer.xml` and `.bin`), which OpenVINO GenAI needs to open a folder.

    record = write(folder / "tokenizer", 77)

It is made by openvino_tokenizers from the same tokenizer.json that our runtimes read, run from the saved file, and
compared with our runtimes' token ids. Our own runtimes do not need it. Four things are mended on the way:

- The text is always cut so that its end token stays. GenAI turns the vendor's own cut off, and loses the end token.
- An added token is no word: with CLIP's word ends the vendor turns the `!` that CLIP-G pads with into the word `!</w>`.
- Bytes that a vocabulary lacks become its unknown token. The vendor returns the ids of the previous text instead.
- Names do not count on through the process, so that two exports have the same bytes.

What is not mended: the vendor folds case (`ß` becomes `ss`), where CLIP only lowers it, and reads special tokens within
a text (`<|endoftext|>`) differently.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.artefact.loading import quiet
from edgeprune.common.files import cannot_write, is_out_of_memory, read_json
from edgeprune.runtimes.text import PromptTokenizer

MODEL = "openvino_tokenizer.xml"
"""The name that GenAI opens; the weights are in the `.bin` next to it."""

PLAIN = (
    "",
    "two red circles",
    "A photo of a cat! Really?",
    "An astronaut, riding a horse: 35mm film; f/1.8 (1969) -- it's the artist's best, isn't it?",
    'a sign that says "Hello World", 3.14 & 100% #art @home',
    "ein Bär über dem Meer",
    "crème brûlée, São Paulo, ÉCOLE, naïve",
    "красный круг над синим квадратом",
    "青い四角の上の赤い円",
    "دائرة حمراء",
    "a 🐱 and a 👩‍🚀",
    "a red circle above a blue square, and " * 60,
)
"""Texts that must get the same ids as in our runtimes; the last one is cut."""

ODD = (
    "  spaces   within  and after  ",
    "lines\nand\ttabs",
    "Straße, 5 µm",
    "a <|endoftext|> b </s> c",
    "ﬁne ½ ①",
    "wow!!! ... ---",
)
"""Texts that a vendor's tokenizer may read differently; those it does are listed in edgeprune_export.json."""


class _UnlikeError(Exception):
    """A converted tokenizer gives other ids than ours."""


def write(folder: Path, length: int) -> dict[str, Any]:
    """Write MODEL into a tokenizer's folder, or warn in one line why there is none.

    Args:
        folder: the exported tokenizer, complete.
        length: the tokens that our runtimes pad a text of this tokenizer to, and cut it at.

    Returns:
        `different`: the texts of ODD with other ids than in our runtimes; or `missing`: why there is no MODEL.

    Raises:
        DiskError: the disk is full, or the file cannot be written.
    """
    path = folder / MODEL
    try:
        with quiet():
            _convert(folder, path, length)
            return {"different": _compare(folder, path, length)}
    except Exception as error:  # openvino_tokenizers raises whatever its parser ran into
        for file in (path, path.with_suffix(".bin")):
            file.unlink(missing_ok=True)
        if "iostream error" in str(error):  # OpenVINO's only hint of a failed write
            raise cannot_write(path, error) from error
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        why = str(error) if isinstance(error, _UnlikeError) else f"{type(error).__name__}: {error}"
        why = " ".join(why.split())
        warnings.warn(f"{folder.name}: no {MODEL}, so OpenVINO GenAI cannot open this export: {why}", stacklevel=2)
        return {"missing": why}


def _convert(folder: Path, path: Path, length: int) -> None:
    """Convert a folder's tokenizer.json and save it as `path`."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    ours = PromptTokenizer(folder, chat=False, max_length=length)
    rules = read_json(folder / "tokenizer.json")
    rules["truncation"] = rules["padding"] = None
    table = _completed(rules)
    raw = Tokenizer.from_str(json.dumps(rules, ensure_ascii=False))
    special = {"pad_token": ours.pad_token}
    config = read_json(folder / "tokenizer_config.json")
    for name in ("bos_token", "eos_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and raw.token_to_id(token) is not None:
            special[name] = token
    model = convert_tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=length, **special), with_detokenizer=False
    )
    _cut(model, length - raw.num_special_tokens_to_add(False), table)
    model.input(0).tensor.set_names({"text"})
    for index, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{index}")
    openvino.save_model(model, path, compress_to_fp16=False)


def _completed(rules: dict[str, Any]) -> NDArray[np.int32] | None:
    """Add the bytes that a byte-level vocabulary lacks to tokenizer.json's content, in place.

    Returns:
        The id that each id of the converted tokenizer stands for; None if they are the same.
    """
    model = rules["model"]
    if model["type"] != "BPE":
        return None
    vocabulary, suffix = model["vocab"], model.get("end_of_word_suffix") or ""
    added = {token["content"]: int(token["id"]) for token in rules.get("added_tokens", [])}
    table = list(range(1 + max([*vocabulary.values(), *added.values()])))
    unknown = vocabulary.get(model.get("unk_token"))
    if "ByteLevel" in json.dumps(rules.get("pre_tokenizer")) and unknown is not None:
        from tokenizers.pre_tokenizers import ByteLevel

        for token in sorted({byte + end for byte in ByteLevel.alphabet() for end in {"", suffix}} - {*vocabulary}):
            vocabulary[token] = len(table)
            table.append(unknown)
    if suffix:
        for token, index in added.items():
            if token + suffix in vocabulary:
                table[vocabulary[token + suffix]] = index
    return None if table == list(range(len(table))) else np.array(table, np.int32)


def _cut(model: Any, length: int, table: NDArray[np.int32] | None) -> None:
    """Cut texts to `length` tokens, and replace ids by `table`, right after the vocabulary's look-up; in place."""
    from openvino import Type, opset13
    from openvino.utils.node_factory import NodeFactory

    by_type = {node.get_type_name(): node for node in model.get_ordered_ops()}
    lookup = by_type.get("BPETokenizer") or by_type["UnigramTokenizer"]
    users = [list(lookup.output(i).get_target_inputs()) for i in range(3)]
    begins, ends, ids = (lookup.output(i) for i in range(3))
    if table is not None:
        ids = opset13.gather(opset13.constant(table), ids, opset13.constant(0, Type.i32)).output(0)

    def text(value: str) -> Any:
        return opset13.constant(np.frombuffer(value.encode(), np.uint8)).output(0)

    def limit() -> Any:
        return opset13.constant(length, Type.i32).output(0)

    # GenAI takes over the constant that is the length of the vendor's cut, so ours is another one. GenAI 2025.4 crashes
    # if the vendor's is not the plain constant that it was then.
    by_type["Truncate"].input(3).replace_source_output(limit())
    for sink in model.get_sinks():
        model.remove_sink(sink)
    for variable in model.get_variables():
        model.remove_variable(variable)
    # `openvino_tokenizers` has added its operations to the factory.
    cut = NodeFactory().create("Truncate", [begins, ends, ids, limit(), text("right"), text("longest_first")])
    for i, inputs in enumerate(users):
        for user in inputs:
            user.replace_source_output(cut.output(i))


def _compare(folder: Path, path: Path, length: int) -> list[str]:
    """Run the saved file and compare it with our runtimes' ids.

    Returns:
        The texts of ODD that get other ids.

    Raises:
        _UnlikeError: a text of PLAIN gets other ids.
    """
    import openvino_tokenizers

    from edgeprune.runtimes.openvino import core

    core().add_extension(str(openvino_tokenizers._ext_path))
    compiled = core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    ours = PromptTokenizer(folder, chat=False, max_length=length)

    def same(text: str) -> bool:
        ids: Sequence[int] = compiled([text])["input_ids"][0].tolist()
        expected: Sequence[int] = ours([text])[0].tolist()
        return [*ids, *[ours.pad_id] * (length - len(ids))] == expected

    for text in PLAIN:
        if not same(text):
            raise _UnlikeError(f"openvino_tokenizers gives other token ids for {text[:40]!r}")
    return [text for text in ODD if not same(text)]
