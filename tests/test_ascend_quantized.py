"""FP8 on the software NPU: providers against the reference, shapes by torch_npu's meta kernels, what each chip gets."""

import pytest
from ascend_ranks import values

pytestmark = pytest.mark.ascend

A3, A5 = "Ascend910_9392", "Ascend950PR_9599"


def test_quantisation_is_the_references_bit_for_bit():
    (found,) = values("ascend_quantized_tasks:quantised", SOC=A5)
    assert len(found) > 100
    assert {name: count for name, count in found.items() if count} == {}


def test_products_are_the_references():
    (found,) = values("ascend_quantized_tasks:products", SOC=A5)
    assert {name.split()[0] for name in found} == {"npu", "bytes", "grouped", "inner", "rounded"}
    assert max(error for name, error in found.items() if not name.startswith("rounded")) < 1e-6, found
    assert max(found.values()) < 2**-8, "BF16 rounds once"


def test_shapes_by_the_meta_kernels_of_torch_npu():
    (found,) = values("ascend_quantized_tasks:fakes", SOC=A5)
    assert found == {
        "data": [[70, 300], "torch.float8_e4m3fn"],
        "scale": [[70, 3], "torch.float8_e8m0fnu"],
        "product": [[70, 96], "torch.bfloat16"],
        "grouped": [[70, 96], "torch.float32"],
        "inner": [[3, 300, 96], "torch.bfloat16"],
    }


def test_what_torch_npu_refuses():
    block, code, inner = values("ascend_quantized_tasks:refused", SOC=A5)[0]
    assert "block_size must be divisible by 32" in block
    assert "scale_dtype supported for torch_npu.float8_e8m0fnu" in code
    assert "k dim of x1 and x2 need be same" in inner


def test_950_multiplies_fp8_and_910_makes_its_bytes():
    (on_950,) = values("ascend_quantized_tasks:chosen", SOC=A5)
    assert on_950.pop("dequantize") == "bytes"
    assert set(on_950.values()) == {"npu"}
    (on_910,) = values("ascend_quantized_tasks:chosen", SOC=A3)
    assert set(on_910.values()) == {"bytes"}
    assert len(on_910) == 7


@pytest.mark.parametrize("soc", [A3, A5])
def test_tokens_travel_in_fp8_between_two_ranks(soc):
    for errors, gradients in values("ascend_quantized_tasks:dispatched", ranks=2, SOC=soc):
        assert errors == [0.0]
        assert gradients == [1.0, 1.0]
