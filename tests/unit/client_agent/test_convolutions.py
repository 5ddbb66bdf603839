"""Convolutions are adapted as PEFT does, seen as matrices; batch norms keep the statistics of the base model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)

from client_agent.checkpoint import Checkpoint, load_checkpoint, quiet, usual_targets
from client_agent.config import AgentConfig, LoraSettings
from client_agent.doctor import judged_fit
from client_agent.fingerprint import base_digest
from client_agent.footprint import blueprint, setting_of
from client_agent.images import ImageBatch, ImageEncoder, Images, read_images
from client_agent.layers import (
    as_matrix,
    hold_statistics,
    keeps_statistics,
    matrix_shape,
    product,
    squared_inputs,
)
from client_agent.model import AdaptedModel
from client_agent.precision import Precision
from client_agent.preparation import prepare, rehearse
from client_agent.private_training import rehearse_privately
from client_agent.scoring import sensitivity_scores
from client_agent.starting import Start, read_adapter
from client_agent.targets import WHOLE, Narrowed, adaptable_layers, resolve
from client_agent.training import TrainingRun, train
from examples.agents import Nowhere, agent_file
from shelora.errors import DomainError, Reason
from shelora.federation import TrainingSpec
from shelora.lora.shards import LoraFactors
from shelora.obfuscation import Obfuscation
from tests.models.families import move_statistics
from tests.unit.client_agent.test_images import LABELS, picture, save_vision

TASK = "image-classification"
EVERYWHERE = ("convolution",)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages of two, with strides, shortcuts, and statistics that are not those of fresh norms."""
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 2], layer_type="basic")
    model = ResNetModel(config)
    move_statistics(model)
    return save_vision(model, tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = tmp_path_factory.mktemp("images")
    for label in LABELS:
        (folder / label).mkdir()
        for number in range(6):
            picture(label, number).save(folder / label / f"{number}.png")
    return read_images(folder, "image", "label", LABELS)


def adapted(
    folder: Path,
    targets: tuple[str, ...] = EVERYWHERE,
    start: Start | None = None,
    precision: Precision | None = None,
    narrowed: Narrowed = WHOLE,
) -> AdaptedModel:
    made = AdaptedModel(
        load_checkpoint(str(folder), TASK, LABELS, as_stored=precision is not None),
        task=TASK,
        target_modules=targets,
        lora=LoraSettings(rank=3, alpha=6),
        device=torch.device("cpu"),
        start=start or Start(),
        precision=precision or Precision(),
        narrowed=narrowed,
    )
    made.initialise(Obfuscation(bytes(range(32)), 1))
    return made


def a_round(model: AdaptedModel, examples: Images, rate: float = 0.01) -> ImageBatch:
    """Trains some steps. Returns all examples."""
    encoder = ImageEncoder(model.tokenizer)
    run = TrainingRun(rates=[rate] * 3, batch_size=6, seed=3)
    assert np.isfinite(train(model, encoder, examples, run, lambda _: None).loss)
    return encoder.batch(examples)


def logits(model: AdaptedModel, batch: ImageBatch) -> torch.Tensor:
    with torch.inference_mode():
        return model.predict(batch)[0].clone()


def of_peft(folder: Path, adapter: Path, batch: ImageBatch, *, merged: bool = False) -> torch.Tensor:
    """What PEFT by itself makes of a base model and a saved adapter."""
    with quiet(), torch.inference_mode():
        base = AutoModelForImageClassification.from_pretrained(folder, num_labels=len(LABELS))
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        found = (loaded.merge_and_unload() if merged else loaded)(**batch.inputs)
    return found.logits.clone()


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        (1, 1, 0),
        (3, 2, 1),
        ((3, 2), 1, "same"),
        ((2, 4), 1, "same"),
        (5, (2, 1), "valid"),
        (7, 2, (3, 2)),
    ],
)
def test_a_convolution_multiplies_patches_by_its_matrix(
    kernel: int | tuple[int, int], stride: int | tuple[int, int], padding: int | str | tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, kernel, stride=stride, padding=padding, bias=False)
    x, A, B = torch.randn(2, 3, 11, 9), torch.randn(2, matrix_shape(layer)[1]), torch.randn(4, 2)
    added = (B @ A).view(layer.weight.shape)
    expected = functional.conv2d(x, added, stride=layer.stride, padding=layer.padding)
    torch.testing.assert_close(product(layer, x, B, A), expected, rtol=1e-4, atol=1e-4)

    # With the identity in place of weights a convolution gives its patches.
    width = matrix_shape(layer)[1]
    identity = torch.eye(width, dtype=torch.float64).view(width, *layer.weight.shape[1:])
    patches = functional.conv2d(x.double(), identity, stride=layer.stride, padding=layer.padding)
    torch.testing.assert_close(squared_inputs(layer, x), patches.square().sum(dim=(0, 2, 3)))
    rows = patches.movedim(1, -1) @ as_matrix(layer.weight).double().T
    torch.testing.assert_close(rows.movedim(-1, 1).float(), layer(x), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_convolutions_is_peft_s_own_also_frozen_started_from_and_merged(
    resnet: Path, examples: Images, tmp_path: Path
) -> None:
    model = adapted(resnet)
    shapes = {m.name: (m.out_features, m.in_features) for m in model.matrices}
    assert shapes["resnet.embedder.embedder.convolution"] == (4, 3 * 7 * 7)
    assert shapes["resnet.encoder.stages.1.layers.0.shortcut.convolution"] == (8, 4)
    batch = a_round(model, examples)
    before = logits(model, batch)
    rng = np.random.default_rng(0)
    weights = model.weights()
    for matrix in model.matrices:  # what of a result lies beyond this client's rank
        weights.frozen[matrix.name] = LoraFactors(
            B=rng.normal(0, 0.1, (matrix.out_features, 2)).astype(np.float32),
            A=rng.normal(0, 0.1, (2, matrix.in_features)).astype(np.float32),
        )
    model.load(weights)
    ours = logits(model, batch)
    assert (ours - before).abs().max() > 1e-2
    model.save_adapter(tmp_path / "adapter")
    torch.testing.assert_close(of_peft(resnet, tmp_path / "adapter", batch), ours, rtol=1e-4, atol=1e-4)
    merged = of_peft(resnet, tmp_path / "adapter", batch, merged=True)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)

    again = adapted(resnet, start=read_adapter(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again, batch), ours, rtol=1e-4, atol=1e-4)
    again.load(weights)
    assert (logits(again, batch) - ours).abs().max() > 1e-2


def test_training_leaves_the_statistics_of_batch_norms_bit_by_bit(resnet: Path, examples: Images) -> None:
    model = adapted(resnet)
    before = statistics(model.module)
    assert any(name.endswith("running_var") for name in before)
    batch = a_round(model, examples)
    model.module.train()  # as a Trainer of a script's does before each step
    model.predict(batch)
    for name, value in statistics(model.module).items():
        assert torch.equal(value, before[name]), name

    with quiet():  # what would happen otherwise
        loose = AutoModelForImageClassification.from_pretrained(resnet, num_labels=len(LABELS)).train()
    before = statistics(loose)
    with torch.no_grad():
        loose(**batch.inputs)
    assert any(not torch.equal(value, before[name]) for name, value in statistics(loose).items())


def test_an_example_s_loss_in_training_does_not_depend_on_its_batch(resnet: Path, examples: Images) -> None:
    model = adapted(resnet)
    batch = ImageEncoder(model.tokenizer).batch(examples)
    model.module.train()
    whole = model.losses(batch)
    alone = torch.cat([model.losses(batch.only(index)) for index in range(len(batch))])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    model.module.eval()
    torch.testing.assert_close(model.losses(batch), whole, rtol=1e-4, atol=1e-5)
    rehearse_privately(model, ImageEncoder(model.tokenizer).batch(examples.select([0, 7])))


def test_scores_of_convolutions_are_those_of_their_patches(resnet: Path, examples: Images) -> None:
    model = adapted(resnet)
    encoder = ImageEncoder(model.tokenizer)
    scores = sensitivity_scores(model, encoder, examples, lambda _: None)
    for matrix in model.matrices:
        layer = model.base_layer(matrix.name)
        assert isinstance(layer, nn.Conv2d)
        seen: list[torch.Tensor] = []
        hook = model.layers[matrix.name].register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(x[0]))
        logits(model, encoder.batch(examples))
        hook.remove()
        patches = functional.unfold(seen[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)
        norms = patches.double().square().sum(dim=(0, 2)).sqrt().numpy()
        sums = layer.weight.detach().double().abs().sum(dim=0).flatten().numpy()
        np.testing.assert_allclose(scores[matrix.name], sums * norms, rtol=1e-4)


def test_a_base_in_16_bits_is_normalized_in_32(resnet: Path, examples: Images) -> None:
    model = adapted(resnet, precision=Precision(torch.bfloat16))
    frozen = [module for module in model.module.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    kinds = {(type(module), p.dtype) for module in frozen for p in module.parameters() if not p.requires_grad}
    assert kinds == {(nn.Conv2d, torch.bfloat16), (nn.BatchNorm2d, torch.float32)}
    before = statistics(model.module)
    a_round(model, examples)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model.module).items())


def test_computing_twice_is_refused_before_an_agent_joins_where_the_model_cannot(
    resnet: Path, tmp_path: Path
) -> None:
    """It ended the first round in a traceback, and `doctor` advised it."""
    for label in LABELS:
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(3):
            picture(label, number).save(tmp_path / "images" / label / f"{number}.png")
    file = agent_file(Nowhere(), federation="films", name="one", model=resnet) | {"data": {"train": "images"}}
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(file))
    spec = TrainingSpec(base_model="tiny", task=TASK, labels=LABELS, target_modules=EVERYWHERE, batch_size=4)
    once = AgentConfig.load(tmp_path / "agent.yaml", {})
    twice = AgentConfig.load(
        tmp_path / "agent.yaml", {"SHELORA_AGENT__TRAINING__GRADIENT_CHECKPOINTING": "true"}
    )

    assert prepare(once, spec).model.matrices
    with pytest.raises(
        DomainError, match="gradient_checkpointing: resnet models do not support it"
    ) as refused:
        prepare(twice, spec)
    assert refused.value.reason is Reason.CONFIGURATION_INVALID
    sizes, now = blueprint(str(resnet), spec, 4), setting_of(once, spec)
    for free in (0, sizes.needed(now) // 2):
        assert "checkpointing" not in judged_fit(sizes, now, free).remedy


def test_statistics_belong_to_the_base_that_agents_compare(resnet: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(resnet), TASK, LABELS)
    digest = base_digest(checkpoint)
    name, value = next(
        iter((n, v) for n, v in checkpoint.model.named_buffers() if n.endswith("running_mean"))
    )
    value += 1e-6
    assert base_digest(checkpoint).weights != digest.weights

    weights = safetensors.torch.load_file(resnet / "model.safetensors")
    del weights[name.removeprefix("resnet.")]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((resnet / file).read_bytes())
    with pytest.raises(DomainError, match=f"lacks {name}") as refused:
        load_checkpoint(str(tmp_path), TASK, LABELS)
    assert refused.value.reason is Reason.MODEL_INVALID


class Scaled(nn.Conv2d):
    """Computes something else than its weights say."""


class Odd(nn.Module):
    """Layers that look like convolutions and are not the matrices that PEFT would adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.scaled = Scaled(4, 4, 3)
        self.line = nn.Conv1d(4, 4, 3)
        self.plain = nn.ModuleDict({"inner": nn.Conv2d(4, 4, 3), "grouped": nn.Conv2d(4, 4, 1)})
        self.norm = nn.BatchNorm2d(4)


@pytest.fixture
def odd() -> Checkpoint:
    model: object = Odd()
    assert not isinstance(model, PreTrainedModel)
    return Checkpoint(model=model, tokenizer=None, head=())  # type: ignore[arg-type]  # its modules are looked at alone


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "grouped|depthwise",
            "adapts grouped, depthwise, of the kind Conv2d; only .* depthwise ones; what can be adapted is inner",
        ),
        ("depthwise", "adapts depthwise, of the kind Conv2d; only convolutions of one group can be adapted"),
        ("dilated", "only convolutions without dilation can be adapted"),
        ("mirrored", "that pad with zeros can be adapted, and this one pads in mode reflect"),
        (
            "scaled",
            r"of the kind Scaled; only linear layers and plain convolutions \(Conv2d\) can be adapted",
        ),
        ("line", "of the kind Conv1d; only linear layers and plain convolutions"),
        ("norm", "of the kind BatchNorm2d; only linear layers and plain convolutions"),
        ("all-linear", "no linear layer beside its head; what can be adapted is inner, plain.grouped"),
        ("query", "no such module; what can be adapted is inner, plain.grouped"),
    ],
)
def test_what_is_not_the_matrix_that_peft_adapts_is_refused_by_name(
    odd: Checkpoint, target: str, said: str
) -> None:
    with pytest.raises(DomainError, match=said) as refused:
        resolve(odd, target.split("|"), WHOLE)
    assert refused.value.reason is Reason.MODEL_INVALID
    assert "\n" not in refused.value.message


def test_names_are_shown_by_which_convolutions_can_be_chosen(odd: Checkpoint) -> None:
    shown: Mapping[str, int] = adaptable_layers(odd)
    assert shown == {"inner": 1, "plain.grouped": 1}
    for name in shown:
        assert resolve(odd, (name,), WHOLE).adapted == (name if "." in name else f"plain.{name}",)


def test_norms_of_batches_are_not_trained_whole(resnet: Path) -> None:
    for saved in ("normalization", "embedder"):
        with pytest.raises(
            DomainError, match="normalizes batches by running statistics; these stay as they are"
        ):
            adapted(resnet, narrowed=Narrowed(saved=[saved]))


def test_a_family_has_names_to_check_with(resnet: Path, examples: Images, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, tf_padding=False)
    folder = save_vision(MobileNetV2Model(config), tmp_path / "mobilenet")
    for path, first in ((resnet, "convolution"), (folder, "expand_1x1.convolution")):
        targets = usual_targets(str(path))
        assert targets[0] == first
        model = adapted(path, targets)
        assert set(targets) <= set(model.adaptable)
        rehearse(model, ImageEncoder(model.tokenizer).batch(examples.select([0])))
        spec = TrainingSpec(base_model="m", task=TASK, labels=LABELS, target_modules=targets)
        assert blueprint(str(path), spec, 3).factors == model.trainable_count - sum(
            t.size for t in model.tensors
        )


def test_a_model_that_asks_a_convolution_for_its_stride_is_refused(tmp_path: Path) -> None:
    """With PEFT's layer in its place, such a model fails, and so it would with the saved adapter."""
    folder = save_vision(MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25)), tmp_path / "mobilenet")
    with pytest.raises(
        DomainError, match=r"PEFT's layers hide the stride: take one that was trained with tf_padding false"
    ):
        adapted(folder, ("expand_1x1.convolution",))


def test_only_norms_with_statistics_are_held() -> None:
    model = nn.ModuleDict(
        {
            "kept": nn.BatchNorm1d(2),
            "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            "stateless": nn.BatchNorm2d(2, track_running_stats=False),
            "layer": nn.LayerNorm(2),
        }
    )
    hold_statistics(model)
    model.train()
    model["kept"](torch.randn(3, 2))
    model["instance"](torch.randn(3, 2, 4, 4))
    model["stateless"](torch.randn(3, 2, 4, 4))
    held = {name for name, module in model.items() if not module.training}
    assert (
        held == {name for name, module in model.items() if keeps_statistics(module)} == {"kept", "instance"}
    )
    assert not statistics(model)["kept.running_mean"].any()
