"""Full, frozen and LoRA fine-tuning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchgeo.tasks import Classification, PixelwiseRegression, SemanticSegmentation

from geofm.callbacks.adapt import Adapt, find_backbone
from geofm.models import MultiSensorViT
from geofm.models.checkpoints.files import CheckpointError
from geofm.models.inputs import View
from geofm.models.timm_vit import load_model
from geofm.models.weights.adapters import adapted_layers, adapter_state, load_adapter_state
from geofm.tasks import DINOv2, Mask2Former

MODEL = 'geofm_vit_nano_patch16_linear'
SIDE = 32


@pytest.fixture(autouse=True)
def same_weights() -> None:
    pytest.importorskip('peft')
    torch.manual_seed(0)


def classification(**kwargs: Any) -> Any:
    return Classification(MODEL, in_channels=15, num_classes=3, lr=0.01, **kwargs)


def loader() -> DataLoader[Any]:
    images = torch.randn(4, 15, SIDE, SIDE)
    samples: Any = [
        {'image': image, 'label': torch.tensor(i % 3)} for i, image in enumerate(images)
    ]
    return DataLoader(samples, batch_size=2)


def fit(
    task: LightningModule,
    *callbacks: Callback,
    folder: Path,
    ckpt_path: Path | None = None,
    **kwargs: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator='cpu',
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **{'max_epochs': 1, **kwargs},
    )
    trainer.fit(task, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def prepare(task: Any, **kwargs: Any) -> Any:
    """A task with adapters whose output is not zero."""
    trainer: Any = None
    Adapt('lora', **kwargs).setup(trainer, task, 'fit')
    for name, parameter in task.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter, std=0.02)
        elif 'ls1' in name or 'ls2' in name:
            # Else the blocks are close to doing nothing.
            nn.init.ones_(parameter)
    return task


def dense(cls: Any, decoder: str, backbone: str = MODEL) -> Any:
    return cls(
        decoder, backbone, in_channels=15, **({'num_classes': 3} if 'Sem' in cls.__name__ else {})
    )


TASKS: dict[str, Any] = {
    'classification': classification,
    'dpt': lambda: dense(SemanticSegmentation, 'dpt', f'tu-{MODEL}'),
    'unet': lambda: dense(SemanticSegmentation, 'unet'),
    'upernet': lambda: dense(SemanticSegmentation, 'upernet'),
    'segformer': lambda: dense(SemanticSegmentation, 'segformer'),
    'regression': lambda: dense(PixelwiseRegression, 'upernet'),
    'mask2former': lambda: Mask2Former(
        MODEL,
        num_queries=2,
        model_args={'encoder_layers': 1, 'decoder_layers': 2, 'hidden_dim': 32},
    ),
    'timm': lambda: Classification('vit_tiny_patch16_224', in_channels=15, num_classes=3),
}


@pytest.mark.parametrize('kind', TASKS)
def test_only_adapters_and_head_learn_and_merging_changes_nothing(kind: str) -> None:
    task = prepare(TASKS[kind]())
    name, _ = find_backbone(task)
    inside = [(n, p) for n, p in task.named_parameters() if n.startswith(f'{name}.')]
    trained = [n for n, p in inside if p.requires_grad]
    assert trained
    assert all('.lora_' in n or n.startswith(f'{name}.head.') for n in trained)
    outside = [p for n, p in task.named_parameters() if not n.startswith(f'{name}.')]
    assert all(p.requires_grad for p in outside)
    side = 224 if kind == 'timm' else 32
    image = torch.randn(2, 15, side, side)
    task.eval()(image).square().sum().backward()
    for n, parameter in inside:
        assert (parameter.grad is not None) == parameter.requires_grad, n
    # The state is that of a plain task, which then computes the same.
    plain = TASKS[kind]()
    plain.load_state_dict(task.state_dict())
    with torch.inference_mode():
        merged, unmerged = plain.eval()(image), task(image)
    assert (merged - unmerged).abs().max() < 1e-5 * merged.abs().max()
    # And the adapters do something.
    for n, parameter in task.named_parameters():
        if 'lora_B' in n:
            nn.init.zeros_(parameter)
    with torch.inference_mode():
        assert not torch.allclose(plain(image), task(image), atol=1e-5)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('fusion', ['linear', 'xattn', 'early', 'joint'])
@pytest.mark.parametrize('target', ['qkv', 'proj', 'mlp'])
def test_packed_crops_run_adapters(target: Any, fusion: str, checkpointing: bool) -> None:
    name = MODEL.replace('linear', fusion)

    def build() -> Any:
        return Classification(name, in_channels=15, num_classes=3)

    task = prepare(build(), targets=[target])
    plain = build()
    plain.load_state_dict(task.state_dict())
    views = [View(torch.randn(2, 15, 32, 32)), View(torch.randn(1, 15, 16, 16))]
    for model in (task.model, plain.model):
        model.set_grad_checkpointing(checkpointing)
    ours, theirs = task.model.forward_views(views), plain.model.forward_views(views)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    sum(one.cls.square().sum() for one in ours).backward()
    grads = [p.grad for n, p in task.named_parameters() if 'lora_' in n]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_bf16() -> None:
    task = prepare(classification())
    task.model.set_grad_checkpointing()
    plain = classification()
    plain.load_state_dict(task.state_dict())
    image = torch.randn(2, 15, SIDE, SIDE)
    exact = plain.eval()(image)
    with torch.autocast('cpu', torch.bfloat16):
        output = task.eval()(image)
    torch.testing.assert_close(output.float(), exact, atol=0.05, rtol=0.05)
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


def test_blocks_and_targets() -> None:
    task = prepare(classification(), blocks=2, targets=['mlp'], rank=3)
    names = adapted_layers(task.model)
    assert {n.split('.')[3] for n in names} == {'4', '5'}
    assert {n.split('.', 4)[4] for n in names} == {'mlp.fc1', 'mlp.fc2'}
    assert all(layer.lora_A['default'].out_features == 3 for layer in names.values())
    with pytest.raises(ValueError, match='blocks 0 to 5'):
        prepare(classification(), blocks=[6])


def test_layer_decay(tmp_path: Path) -> None:
    task = classification()
    trainer = fit(task, Adapt('full', layer_decay=0.5), folder=tmp_path)
    rates = {id(p): g['lr'] for g in trainer.optimizers[0].param_groups for p in g['params']}
    assert len(rates) == len(list(task.parameters()))
    depth = 6
    for name, parameter in task.model.named_parameters():
        power = 0
        if '.blocks.' in name:
            power = depth - int(name.split('.blocks.')[1].split('.')[0])
        elif not name.startswith(('fusion', 'head', 'stand_in')) and '.norm.' not in name:
            power = depth + 1
        assert rates[id(parameter)] == pytest.approx(0.01 * 0.5**power), name
    # The scheduler of the task lowers them all.
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    for _ in range(30):
        scheduler.step(1.0)
    for group in trainer.optimizers[0].param_groups:
        assert group['lr'] < 0.2 * rates[id(group['params'][0])]


def test_frozen(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.extend(m.training for m in pl_module.model.encoders.modules())
            assert pl_module.model.head.training

    task = classification()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    fit(task, Adapt('frozen'), Watch(), folder=tmp_path, val_check_interval=1)
    assert seen
    assert not any(seen)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]) == ('head' not in name), name


def test_lora_checkpoint_is_a_plain_one_and_resumes(tmp_path: Path) -> None:
    first, path = classification(), tmp_path / 'last.ckpt'
    trainer = fit(first, Adapt('lora'), folder=tmp_path)
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert not any('lora' in name for name in content['state_dict'])
    # Lightning, TorchGeo and geofm read it as the checkpoint of a plain task.
    image = torch.randn(2, 15, SIDE, SIDE)
    plain: Any = Classification.load_from_checkpoint(path, map_location='cpu').eval()
    again = classification(weights=str(path)).eval()
    with torch.inference_mode():
        expected = first.eval()(image)
        torch.testing.assert_close(plain(image), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again(image), expected, atol=1e-5, rtol=1e-5)
        features = first.model.forward_features(image)
        loaded = load_model(path)
        assert isinstance(loaded, MultiSensorViT)
        torch.testing.assert_close(loaded.forward_features(image), features, atol=1e-5, rtol=1e-5)
    # Resumed for no epoch more, it has the adapters to the bit.
    second = classification()
    fit(second, Adapt('lora'), folder=tmp_path, ckpt_path=path)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    # Evaluated without adapters, with or without the option, it is the same task.
    for callback in (Adapt('lora'), Adapt()):
        tested = classification()
        trainer = Trainer(
            accelerator='cpu', logger=False, enable_progress_bar=False, callbacks=[callback]
        )
        trainer.validate(tested, loader(), ckpt_path=path, verbose=False)
        with torch.inference_mode():
            torch.testing.assert_close(tested.eval()(image), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match=r'resume it with(out)? --adapt\.method lora'):
        fit(classification(), Adapt(), folder=tmp_path, ckpt_path=path)
    with pytest.raises(CheckpointError, match=r'adapt\.rank'):
        fit(classification(), Adapt('lora', rank=2), folder=tmp_path, ckpt_path=path)


@pytest.mark.parametrize('damage', ['missing', 'shape', 'nan', 'type'])
def test_damaged_adapters_are_refused(damage: str) -> None:
    task = prepare(classification())
    state: Any = {k: {p: t.clone() for p, t in v.items()} for k, v in adapter_state(task).items()}
    first = next(iter(state.values()))
    if damage == 'missing':
        del first['a']
    elif damage == 'shape':
        first['b'] = first['b'][:-1]
    elif damage == 'nan':
        first['b'][0] = float('nan')
    else:
        state = [1]
    before = {k: v.clone() for k, v in task.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_adapter_state(task, state)
    assert '\n' not in str(caught.value)
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_cannot_be() -> None:
    trainer: Any = None
    with pytest.raises(ValueError, match='layer_decay'):
        Adapt('full', layer_decay=0)
    with pytest.raises(ValueError, match='rank'):
        Adapt('lora', rank=0)
    with pytest.raises(ValueError, match='contradict'):
        Adapt('lora').setup(trainer, classification(freeze_backbone=True), 'fit')
    with pytest.raises(ValueError, match='0 vision transformers'):
        Adapt('full').setup(trainer, Classification('resnet18', num_classes=3), 'fit')
    small: Any = {'prototypes': 8, 'head_hidden_dim': 8, 'head_bottleneck_dim': 8}
    with pytest.raises(ValueError, match='2 vision transformers'):
        Adapt('full').setup(trainer, DINOv2(MODEL, **small), 'fit')
