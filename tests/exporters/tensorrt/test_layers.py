"""TensorRT's list of kernels: read in the form that 1.7.1 prints, by kernel, type, profile and region."""

from __future__ import annotations

import json

import pytest

from dcompile.exporters.tensorrt.layers import (
    Layer,
    Promise,
    check_promises,
    count_kernels,
    read_inspector,
    read_layers,
    rows_by_region,
)
from dcompile.runtime.errors import EngineError

TAIL = "Format: (Linear) Row major linear format"


def tensor(name: str, kind: str, *shape: int) -> str:
    dims = ",".join(map(str, shape))
    return f"{{ Name: {name}, Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {kind}, {TAIL} }}"


def line(name: str, kind: str, inputs: list[str], constants: list[str], outputs: list[str], *sources: str) -> str:
    metadata = "\x1f".join(f"[ONNX Layer: {source}]" for source in sources)
    held = f"Constants: [ {', '.join(constants)} ], " if constants else ""
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)} ], {held}Outputs: [ {', '.join(outputs)} ], "
        f"TacticName: tactic_0x1, StreamId: 0, Metadata: {metadata}"
    )


def gemm(name: str, kind: str, weights: str, *sources: str, source: str = "x") -> str:
    given, stored = tensor(source, kind, 512, 768), tensor("w", weights, 768, 3072)
    held, made = [stored, tensor("alpha", "Float", 1)], [tensor("y", "Half", 512, 3072)]
    return line(name, "gemm", [given], held, made, *sources)


def text(*lines: str) -> str:
    return "\n".join(["Layers:", *lines, "", "I/O Tensors:", " Name: x, IOMode: Input, DataType: Half", ""])


def test_one_line_in_full() -> None:
    (layer,) = read_layers(text(gemm("net.fc/linear_myl0_1", "Int8", "Int8", "net.fc/linear", "net.fc/dequantize")))
    assert (layer.name, layer.kind, layer.kernel, layer.types) == ("net.fc/linear_myl0_1", "gemm", "gemm", "int8")
    assert layer.sources == ("net.fc/linear", "net.fc/dequantize")
    assert [(each.name, each.shape, each.type) for each in layer.inputs] == [("x", (512, 768), "int8")]
    assert [each.type for each in layer.constants] == ["int8", "fp32"]


@pytest.mark.parametrize(
    ("name", "kind", "kernel"),
    [
        ("_gemm_mha_v2_myl0_3", "kgen", "attention"),
        ("__myl_FcAddMul_myl0_3", "runtime_fusion", "gemm"),
        ("__myl_CorrAdd_myl0_3", "runtime_fusion", "conv"),
        ("conv2d_myl0_3", "correlation", "conv"),
        ("__myl_DynaReshReshMove_myl0_3", "kgen", "quantize"),
        ("__myl_MulCast_myl0_3", "kgen", "pointwise"),
        ("__myl_Conc_myl0_3", "runtime_function", "runtime_function"),
    ],
)
def test_what_a_kernel_does(name: str, kind: str, kernel: str) -> None:
    x = tensor("x", "Half", 2, 8, 8)
    (layer,) = read_layers(text(line(name, kind, [x, x, x], [], [x], "net/a")))
    assert layer.kernel == kernel


def test_what_does_no_work_is_left_out() -> None:
    silent = [line(f"{kind}_myl0_{i}", kind, [], [], []) for i, kind in enumerate(("wait", "signal", "shape_call"))]
    assert read_layers(text(*silent)) == ()


@pytest.mark.parametrize(
    ("given", "held", "types"),
    [
        (["Half"], ["Half"], "fp16"),
        (["Half"], ["Int4", "Half"], "fp16 x int4"),  # weights and their block scales
        (["FP4E2M1", "FP8"], ["FP4E2M1", "FP8"], "fp4"),
        (["Half", "Float"], ["Float"], "fp32"),  # an addend in half precision beside the factor
        (["Half", "Half"], [], "fp16"),  # two activations
    ],
)
def test_what_a_product_multiplies(given: list[str], held: list[str], types: str) -> None:
    inputs = [tensor(f"x{i}", kind, 64, 64) for i, kind in enumerate(given)]
    constants = [tensor(f"w{i}", kind, *((4096, 64) if i == 0 else (64, 2))) for i, kind in enumerate(held)]
    (layer,) = read_layers(text(line("p_myl0_1", "gemm", inputs, constants, [tensor("y", "Half", 64, 64)], "net/p")))
    assert layer.types == types


def test_attention_is_what_most_of_its_inputs_are() -> None:
    def attention(*kinds: str) -> Layer:
        inputs = [tensor(f"i{n}", kind, 8, 64, 64) for n, kind in enumerate(kinds)]
        return read_layers(text(line("_gemm_mha_v2_myl0_1", "kgen", inputs, [], inputs[:1], "net/a")))[0]

    assert attention("FP8", "FP8", "FP8", "Half").types == "fp8"  # and a mask
    assert attention("Half", "Half", "FP8").types == "fp16"


def test_all_that_was_compiled_together_belongs_to_one_profile() -> None:
    """Only the first of the second profile's kernels says so."""
    layers = read_layers(
        text(
            gemm("a_myl0_1", "Half", "Half", "net.a/linear"),
            gemm("a [profile 1]_myl1_2", "Half", "Half", "net.a/linear [profile 1]"),
            gemm("__mye12_myl1_3", "Half", "Half", "net.b/linear"),
        )
    )
    assert [layer.profile for layer in layers] == [0, 1, 1]
    assert layers[1].sources == ("net.a/linear",)
    assert count_kernels(layers, ("single", "batch")) == {"single: gemm fp16": 1, "batch: gemm fp16": 2}
    assert count_kernels(layers[:1], ("batch",)) == {"gemm fp16": 1}


def test_rows_name_the_module_that_all_of_a_kernel_lies_in() -> None:
    layers = read_layers(
        text(
            gemm("qkv_myl0_1", "Int8", "Int8", "net.blocks.0.attn.q/linear", "net.blocks.0.attn.k/linear_1"),
            gemm("fc_myl0_2", "Half", "Half", "net.blocks.0.fc/linear_2"),
            line("__myl_Add_3", "kgen", [tensor("x", "Half", 2)], [], [tensor("y", "Half", 2)], "net.blocks.0/add"),
            gemm("out_myl0_4", "Half", "Half", "matmul"),
        )
    )
    assert rows_by_region(layers, ("batch",)) == (
        ("net.blocks.0.attn", "gemm", "int8"),
        ("net.blocks.0.fc", "gemm", "fp16"),
        ("step", "gemm", "fp16"),
    )


def test_a_line_in_another_form_is_no_silent_gap() -> None:
    with pytest.raises(EngineError, match=r"line in a new form \('Name: x Kernel: gemm'"):
        read_layers(text("Name: x Kernel: gemm"))


def test_an_inspector_says_the_same() -> None:
    def entry(name: str, kind: str) -> dict[str, str | list[int]]:
        return {"Name": name, "Dimensions": [512, 768], "Format/Datatype": f"Row major linear {kind} format"}

    layer = {
        "Name": "fc [profile 1]", "LayerType": "gemm", "Inputs": [entry("x", "Int8")],
        "Constants": [{"Name": "w", "Dimensions": [768, 64], "Datatype": "Int8"}], "Outputs": [entry("y", "Half")],
        "Metadata": "[ONNX Layer: net.fc/linear [profile 1]]",
    }  # fmt: skip
    (found,) = read_inspector(json.dumps({"Layers": ["only a name", layer]}))
    assert (found.types, found.sources, found.profile) == ("int8", ("net.fc/linear",), 1)
    assert found.outputs[0].type == "fp16"


INT8 = Promise("net.fc/linear", "int8", "int8", ("net.fc/dequantize",))


def test_a_promise_is_kept_by_the_kernel_of_its_node() -> None:
    check_promises("full", read_layers(text(gemm("a_myl0_1", "Int8", "Int8", "net.fc/linear"))), [INT8])


def test_a_promise_is_broken_by_a_product_in_another_type() -> None:
    layers = read_layers(text(gemm("a_myl0_1", "Half", "Half", "net.fc/linear")))
    with pytest.raises(EngineError, match=r"engine 'full': net\.fc is promised in int8, TensorRT compiled gemm"):
        check_promises("full", layers, [INT8])


def test_a_promise_is_broken_where_no_product_is_found() -> None:
    layers = read_layers(text(gemm("a_myl0_1", "Int8", "Int8", "net.other/linear")))
    with pytest.raises(EngineError, match=r"net\.fc is promised in int8, TensorRT compiled no kernel for it"):
        check_promises("full", layers, [INT8])


def test_every_profile_must_keep_a_promise() -> None:
    layers = read_layers(
        text(
            gemm("a_myl0_1", "Int8", "Int8", "net.fc/linear"),
            gemm("a [profile 1]_myl1_1", "Half", "Half", "net.fc/linear"),
        )
    )
    with pytest.raises(EngineError, match=r"compiled gemm in fp16"):
        check_promises("full", layers, [INT8])


@pytest.mark.parametrize(("reader", "kept"), [("net.fc/dequantize", True), ("net.other/dequantize", False)])
def test_weights_alone_are_kept_by_any_kernel_that_reads_them(reader: str, kept: bool) -> None:
    dequantise = line(
        "__myl_Cast_myl0_0", "kgen", [], [tensor("w", "FP4E2M1", 64, 64)], [tensor("y", "Half", 64, 64)], reader
    )  # fmt: skip
    layers = read_layers(text(dequantise, gemm("a_myl0_1", "Half", "Half", "net.fc/linear")))
    promise = Promise("net.fc/linear", None, "fp4", ("net.fc/dequantize",))
    if kept:
        check_promises("full", layers, [promise])
    else:
        with pytest.raises(EngineError, match="promised in fp4 weights"):
            check_promises("full", layers, [promise])
