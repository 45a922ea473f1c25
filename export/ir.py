"""Saves OpenVINO IR (`.xml` and `.bin`) one weight after the other.

OpenVINO's own `save_model` reads all weights through a mapping of the source file and keeps Python from running
meanwhile, so nothing can release the pages: the process grows by the size of the file, 4.9 GB of a T5-XXL in 8 bits.
Here it saves the graph with a parameter in place of each large constant. Then the constants' bytes are appended to the
`.bin`, and the XML is edited to say where.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgeprune.common.files import write_text
from edgeprune.runtimes.mapped import evict

_LARGE = 2**16
"""Bytes of a constant that is saved alone."""
_ALIGNED = 64
"""Bytes: each weight begins at a multiple, as vectors are read from the mapped file."""


def save(model: Any, path: Path, *, precise: Set[str], source: Path) -> None:
    """Save a model, which is of no use afterwards.

    Args:
        model: `openvino.Model`.
        path: the `.xml` to write; the `.bin` is beside it.
        precise: names of layers to mark as `precise`, which OpenVINO's Python API cannot do.
        source: the file of weights that the model maps; its pages are released after each weight.

    Raises:
        DiskError: the disk is full.
        RuntimeError: OpenVINO cannot save the graph.
    """
    import openvino

    weights = _apart(model)
    openvino.save_model(model, path, compress_to_fp16=False)
    places = {}
    with path.with_suffix(".bin").open("ab") as file:
        for key in list(weights):
            constant = weights.pop(key)
            file.write(bytes(-file.tell() % _ALIGNED))
            places[key] = {
                "name": constant.get_friendly_name(), "offset": file.tell(), "size": constant.get_byte_size(),
            }  # fmt: skip
            file.write(memoryview(constant.data).cast("B"))
            del constant
            evict(source)
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if found := places.get(layer.attrib["name"]):
            _to_constant(layer, **found)
        if layer.attrib["name"] in precise:
            info = layer.find("rt_info")
            info = ElementTree.SubElement(layer, "rt_info") if info is None else info
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    text = ElementTree.tostring(tree.getroot(), encoding="unicode")
    write_text(path, f'<?xml version="1.0"?>\n{text}\n')


def _apart(model: Any) -> dict[str, Any]:
    """Put a parameter in place of each large constant; return the constants by the names of these."""
    from openvino import opset13

    weights: dict[str, Any] = {}
    parameters = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_byte_size() < _LARGE:
            continue
        key = f"weight:{len(weights)}"
        parameter = opset13.parameter(node.get_output_shape(0), node.get_element_type(), name=key)
        parameter.output(0).set_names(node.output(0).get_names())
        for user in node.output(0).get_target_inputs():
            user.replace_source_output(parameter.output(0))
        weights[key] = node
        parameters.append(parameter)
    model.add_parameters(parameters)
    return weights


def _to_constant(layer: ElementTree.Element, *, name: str, offset: int, size: int) -> None:
    """Make the layer of a parameter a constant of these bytes of the `.bin`."""
    data = layer.find("data")
    assert data is not None
    layer.attrib |= {"name": name, "type": "Const"}
    shape = data.attrib["shape"].replace(",", ", ")
    data.attrib = {
        "element_type": data.attrib["element_type"], "shape": shape, "offset": str(offset), "size": str(size),
    }  # fmt: skip
