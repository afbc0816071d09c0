"""Speed-ups: the same numbers, or close ones, under the same names; refused where they cannot be had."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._inductor.cudagraph_trees import MarkStepBox
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

from flip_hf import FlipModel
from flip_hf.console.fields import OptionError
from flip_hf.modeling.blocks_flip import FlipEncoderLayer
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.training.arguments import OptimizationArguments
from flip_hf.training.distribution import Distribution
from flip_hf.training.encoder import PairEncoder, recompute_activations
from flip_hf.training.freezing import freeze, read_frozen
from flip_hf.training.health import Health
from flip_hf.training.muon import skip_where
from flip_hf.training.optimization import make_optimizer
from flip_hf.training.packing import pack_texts
from flip_hf.training.speed_ups import check_hardware, compute_in_float8, speed_up
from flip_hf.training.step import OneProcess, accumulate_gradients, train_step
from tests.helpers.arguments import parse
from tests.helpers.contrast import make_batch, make_model, take
from tests.helpers.models import randomize, tiny_config
from tests.helpers.trainers import make_trainer

CPU = torch.device("cpu")


def packed(batch: dict, model: FlipModel) -> dict:
    texts = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    return batch | pack_texts(**texts, text_config=model.config.get_text_config())


def gradients_of(model: FlipModel, batches: list[dict], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The loss of a step and its gradients, by name."""
    model.zero_grad()
    result = accumulate_gradients(OneProcess(PairEncoder(model, dtype)), batches)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": result.loss, **gradients}


def distance(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative error of all gradients, as one vector."""
    names = [name for name in expected if name != "loss"]
    one, other = (torch.cat([each[name].flatten() for name in names]) for each in (ours, expected))
    return float((one - other).norm() / other.norm())


def float_batch() -> dict:
    batch = make_batch()
    return {**batch, "pixel_values": batch["pixel_values"].float()}


def float_model() -> FlipModel:
    return randomize(make_model().float())


# -- fused_qkv ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sdpa", "eager", "recomputed", "packed", "in pieces", "frozen"])
def test_one_product_has_the_numbers_of_three(how):
    model = randomize(make_model())
    if how == "eager":
        model.set_attn_implementation(how)
    elif how == "recomputed":
        recompute_activations(model, {"use_reentrant": False})
    elif how == "frozen":
        freeze(model, read_frozen(["image:1", "text"]))
    batch = packed(make_batch(), model) if how == "packed" else make_batch()
    batches = [take(batch, slice(0, 6)), take(batch, slice(6, 12))] if how == "in pieces" else [batch]
    expected = gradients_of(model, batches)
    names = list(model.state_dict())
    speed_up(model, ["fused_qkv"])
    products = count_products(model, batch) if how == "sdpa" else 0
    ours = gradients_of(model, batches)
    assert list(ours) == list(expected) and list(model.state_dict()) == names
    assert products == (4 if how == "sdpa" else 0)  # one of each block
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


def count_products(model: FlipModel, batch: dict) -> int:
    """The number of products of a forward pass that give three times the width."""
    found = []

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is nn.functional.linear and result.shape[-1] == 3 * 32:
                found.append(result.shape)
            return result

    with Products():
        PairEncoder(model)(**batch)
    return len(found)


# -- bf16_residual -----------------------------------------------------------------------------------------------------


def dtypes_between_blocks(model: FlipModel, batch: dict, dtype: torch.dtype | None) -> set[torch.dtype]:
    seen = set()
    for module in model.modules():
        if isinstance(module, FlipEncoderLayer):
            module.register_forward_hook(lambda _, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
    outputs = PairEncoder(model, dtype)(**batch)
    assert outputs.image_embeds.dtype == outputs.text_embeds.dtype == torch.float32
    return seen


def test_hidden_states_between_blocks_are_in_bfloat16():
    model = float_model()
    batch = packed(float_batch(), model)
    plain = copy.deepcopy(model)
    speed_up(model, ["bf16_residual"])
    assert dtypes_between_blocks(plain, batch, torch.bfloat16) == {torch.float32}
    assert dtypes_between_blocks(model, batch, torch.bfloat16) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_with_residuals_in_bfloat16_are_near_those_in_float32(recomputed):
    """Within 3 %, and at most twice as far as those of autocast alone."""
    model = float_model()
    if recomputed:
        recompute_activations(model, {"use_reentrant": False})
    exact = gradients_of(model, [float_batch()])
    autocast = distance(gradients_of(model, [float_batch()], torch.bfloat16), exact)
    speed_up(model, ["bf16_residual"])
    rounded = gradients_of(model, [float_batch()], torch.bfloat16)
    assert {value.dtype for value in rounded.values()} == {torch.float32}
    assert 0 < distance(rounded, exact) < min(2 * autocast, 0.03)


def test_without_autocast_residuals_stay_as_they_are():
    model = float_model()
    expected = gradients_of(model, [float_batch()])
    speed_up(model, ["bf16_residual"])
    ours = gradients_of(model, [float_batch()])
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_a_layernorm_computes_in_float32():
    model = float_model()
    speed_up(model, ["bf16_residual"])
    layer = model.vision_model.encoder.layers[0]
    hidden = (100 + torch.randn(3, 5, 32)).bfloat16()  # in bfloat16 its variance would be far off
    expected = nn.functional.layer_norm(
        hidden.float(), (32,), layer.layer_norm1.weight, layer.layer_norm1.bias, layer.layer_norm1.eps
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer.layer_norm1(hidden)
    assert torch.equal(ours, expected.bfloat16())


@pytest.mark.parametrize("how", ["packed", "recomputed"])
def test_hooks_compile_into_one_graph_that_rounds_alike(how):
    """By a compiler that runs the graph's operations as they are."""
    model = float_model()
    if how == "recomputed":
        recompute_activations(model, {"use_reentrant": False})
        model.disable_input_require_grads()  # as models.py
    speed_up(model, ["fused_qkv", "bf16_residual"])
    batch = packed(float_batch(), model) if how == "packed" else float_batch()
    expected = gradients_of(model, [batch], torch.bfloat16)
    torch._dynamo.reset()  # no graph of another test
    encoder = PairEncoder(model, torch.bfloat16)
    encoder.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    model.zero_grad()
    loss = accumulate_gradients(OneProcess(encoder), [batch]).loss
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)
    assert distance({name: p.grad for name, p in model.named_parameters()}, expected) < 1e-4


# -- cuda_graphs -------------------------------------------------------------------------------------------------------


class Replayed(nn.Module):
    """An encoder whose outputs are overwritten by the next call, as those of a replayed graph are."""

    def __init__(self, encoder: PairEncoder):
        super().__init__()
        self.encoder = encoder
        self._last: list[torch.Tensor] = []

    def forward(self, **batch):
        with torch.no_grad():
            for value in self._last:
                value.detach().fill_(float("nan"))
        encoded = self.encoder(**batch)
        self._last = [value for value in encoded if value is not None]
        return encoded


@pytest.mark.parametrize("bias", [None, -3.0])
def test_the_numbers_of_a_step_outlive_the_next_replay(bias):
    trained = OneProcess(Replayed(PairEncoder(make_model(bias=bias))))
    first = accumulate_gradients(trained, [make_batch()])
    accumulate_gradients(trained, [make_batch()])
    values = [value for value in vars(first).values() if value is not None]
    assert len(values) == 3 + (bias is not None) and all(torch.isfinite(value).all() for value in values)


class OffTheDevice(TorchDispatchMode):
    """Finds operations whose results are on another device than `meta`, which stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.found += [str(func) for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not x.is_meta]
        return result


class WithoutAutocast(PairEncoder):
    """Autocast does not know `meta`."""

    def autocast(self):
        return nullcontext()


@pytest.mark.parametrize("text", [{}, {"causal": True, "pooling_type": "eos", "eos_token_id": 599}])
def test_nothing_of_a_pass_is_on_the_cpu_or_no_graph_would_be_recorded(text):
    config = tiny_config(text=text, logit_bias_init_value=-3.0)
    with torch.device("meta"):
        model = FlipModel(config).train()
    batch = packed(make_batch(), model)
    batch["patches"] = cut_patches(batch.pop("pixel_values").float(), 8, batch["ids_keep"])
    batch = {name: value.to("meta") for name, value in batch.items()}
    with OffTheDevice() as mode:
        encoded = WithoutAutocast(model)(**batch)
        (encoded.image_embeds.sum() + encoded.text_embeds.sum() + encoded.logit_scale.sum()).backward()
    assert mode.found == []


@contextmanager
def autocast_on_cuda() -> Iterator[None]:
    """What `torch.autocast` does where there is a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.skipif(torch.version.cuda is None, reason="This torch is built without CUDA")
@pytest.mark.parametrize("names", [[], ["fused_qkv", "bf16_residual"]])
def test_a_pass_under_cudas_own_autocast_stays_on_the_device_and_waits_for_nothing(names, monkeypatch):
    """On fake tensors, which know devices and dtypes, and have no values to wait for. A backward pass needs a GPU."""
    monkeypatch.setattr(PairEncoder, "autocast", lambda encoder: autocast_on_cuda())
    batch = packed(make_batch(), make_model())
    with FakeTensorMode() as mode:
        with torch.device("cuda"):
            model = FlipModel(tiny_config()).train()
        speed_up(model, names)
        seen = dtypes_between_blocks(model, {name: move(mode, value) for name, value in batch.items()}, torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = make_optimizer(model, OptimizationArguments())
        health = Health(3, torch.device("cuda"))
        for _ in range(2):
            skip_where(health.judge(nn.utils.clip_grad_norm_(model.parameters(), 1.0)), optimizer)
            optimizer.step()
    assert seen == {torch.bfloat16 if names else torch.float32}


def move(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    value = mode.from_tensor(value).to("cuda", non_blocking=True)
    return value.float() if value.is_floating_point() else value


class Doubling(nn.Module):
    """As small a model as can be compiled."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x * self.weight


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_is_compiled_is_recorded_where_that_is_asked_for(cuda_graphs):
    seen = []

    def remember(graph: torch.fx.GraphModule, inputs: list, **options):
        seen.append(options)
        return graph.forward

    torch._dynamo.register_backend(remember, name=f"remember_{cuda_graphs}")
    model: Any = Doubling()
    make = partial(make_optimizer, options=OptimizationArguments())
    name = f"remember_{cuda_graphs}"
    distribution = Distribution(Accelerator(cpu=True), model, make, None, name, cuda_graphs)
    distribution.model(torch.ones(2)).sum().backward()
    assert seen == [{"mode": "reduce-overhead"} if cuda_graphs else {}]


def test_a_model_with_other_hooks_is_compiled_anew(monkeypatch):
    """By its default, torch.compile would run the graph of the first model for the second one, too."""
    monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", True)
    make = partial(make_optimizer, options=OptimizationArguments())
    for names in ([], ["bf16_residual"]):
        model = float_model()
        speed_up(model, names)
        expected = PairEncoder(model, torch.bfloat16)(**float_batch()).image_embeds
        distribution = Distribution(Accelerator(cpu=True), PairEncoder(model, torch.bfloat16), make, None, "eager")
        assert torch.equal(distribution.model(**float_batch()).image_embeds, expected), names


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_each_step_of_recorded_graphs_is_announced(cuda_graphs):
    make = partial(make_optimizer, options=OptimizationArguments())
    encoder = PairEncoder(make_model())
    distribution = Distribution(Accelerator(cpu=True), encoder, make, None, cuda_graphs=cuda_graphs)
    before = MarkStepBox.mark_step_counter
    for _ in range(2):
        train_step(distribution, [make_batch()], lambda batch: batch, learning_rate=0.01, reconstruction_weight=1.0)
    assert abs(MarkStepBox.mark_step_counter - before) == (2 if cuda_graphs else 0)


def test_the_batches_of_a_compiled_run_have_few_shapes(tar_folder, tmp_path):
    """Each of which is compiled, for a minute or more, and recorded where graphs are."""
    for compiled in (False, True):
        trainer = make_trainer(tmp_path / str(compiled), tar_folder, "--compile", str(compiled))
        assert trainer.loader._stream.tokenize.fewest_shapes is compiled


# -- fp8 ---------------------------------------------------------------------------------------------------------------

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


@needs_torchao
@pytest.mark.filterwarnings("ignore")  # torchao's own, of its imports
def test_float8_products_are_near_under_the_same_names():
    model = float_model()
    names = list(model.state_dict())
    exact = gradients_of(model, [float_batch()])
    compute_in_float8(model, emulate=True)
    ours = gradients_of(model, [float_batch()])
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["vision_model.encoder.layers.0.mlp.fc1"] == kinds["text_model.encoder.layers.1.self_attn.q_proj"]
    assert kinds["vision_model.encoder.layers.0.mlp.fc1"] == "Float8Linear" and kinds["visual_projection"] == "Linear"
    assert list(model.state_dict()) == names and {p.dtype for p in model.parameters()} == {torch.float32}
    assert list(ours) == list(exact) and 0.001 < distance(ours, exact) < 0.3


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_fused_projections_and_odd_layers_stay_out_of_float8():
    model = FlipModel(tiny_config(vision={"intermediate_size": 40})).train()
    speed_up(model, ["fused_qkv"])
    compute_in_float8(model, emulate=True)
    layer = model.vision_model.encoder.layers[0]
    kinds = [type(each).__name__ for each in (layer.self_attn.q_proj, layer.self_attn.out_proj, layer.mlp.fc1)]
    assert kinds == ["FlipQueryKeyValue", "Float8Linear", "Linear"]
    gradients_of(model, [float_batch()])
    assert layer.self_attn.v_proj.weight.grad.any()


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_with_speed_ups_saves_a_model_as_any_other(tar_folder, tmp_path):
    trainer = make_trainer(tmp_path, tar_folder, "--speed_ups", "fused_qkv", "bf16_residual", "--precision", "bf16")
    assert all(layer.self_attn.fuses_projections for layer in trainer.flip.vision_model.encoder.layers)
    seen = []
    trainer.flip.text_model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    trainer.run()
    assert set(seen) == {torch.bfloat16}
    saved, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert list(saved.state_dict()) == list(FlipModel(saved.config).state_dict())
    assert not any(loading.values()) and {p.dtype for p in saved.parameters()} == {torch.float32}
    assert not saved.vision_model.encoder.layers[0].self_attn.fuses_projections


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cuda_graphs"], "^--speed_ups cuda_graphs needs a compiled step: add --compile True"),
        (["fp8"], "^--speed_ups fp8 needs a compiled step"),
        (["bf16_residual", "--precision", "fp32"], "^--speed_ups bf16_residual rounds to bfloat16"),
        (["fused_qkv", "--lora", "image:4", "--model_name_or_path", "x"], "without the adapters of --lora"),
        (["qkv"], "^--speed_ups is one of fused_qkv, bf16_residual, cuda_graphs, fp8, got 'qkv'"),
    ],
)
def test_speed_ups_that_contradict_other_options_are_refused(argv, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse("--train_data", "x", "--speed_ups", *argv)
    assert "\n" not in str(caught.value)


def test_what_the_hardware_lacks_is_refused_before_anything_is_written(tar_folder, tmp_path):
    options = ("--compile", "True", "--speed_ups", "cuda_graphs")
    with pytest.raises(ValueError, match="^--speed_ups cuda_graphs needs a CUDA device, and this run is on: cpu."):
        make_trainer(tmp_path / "run", tar_folder, *options)
    assert not list((tmp_path / "run").glob("*"))
    with pytest.raises(ValueError, match="^--speed_ups bf16_residual needs bfloat16, and this run is in float32"):
        check_hardware(["bf16_residual"], CPU, None, num_micro=1)


def test_older_gpus_and_batches_in_pieces_are_refused(monkeypatch):
    """What a GPU says of itself is made up; no test has one."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match="^--speed_ups fp8 needs a GPU of compute capability 8.9 or higher, and NVIDI"):
        check_hardware(["fp8"], gpu, torch.bfloat16, num_micro=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_hardware(["fp8", "cuda_graphs"], gpu, torch.bfloat16, num_micro=1)
    with pytest.raises(ValueError, match="--micro_batch_size makes 2 of this process's"):
        check_hardware(["cuda_graphs"], gpu, torch.bfloat16, num_micro=2)
    with pytest.raises(ValueError, match="^--speed_ups cuda_graphs supports a single process, and this run has 8: "):
        check_hardware(["cuda_graphs"], gpu, torch.bfloat16, num_micro=1, num_processes=8)
