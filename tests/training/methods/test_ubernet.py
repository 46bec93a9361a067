"""One sum of gradients by two ways, memory that does not grow with tasks, and heads that move when it is their turn."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.augment.operations import luma
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.methods.ubernet import (
    ClassHead,
    Config,
    DenseHead,
    UberNet,
    edge_strength,
    task_values,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

COLUMNS = {"group": 5, "identity": 9, "material": 3, "designer": 4}
EIGHT = ("edges", "color", "reconstruction", "rotation", "label", "group", "identity", "material")


def build(size=24, channels=3, norm="group", **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, size, size),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        num_classes=6,
        targets=COLUMNS,
        batch_size=8,
        steps_per_epoch=4,
        total_steps=40,
        optimizer=Optimizer(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.01, schedule="constant"),
    )
    config = Config(**{"hidden_dim": 8, "augment": Compose(steps=()), **config})
    backbone = create_backbone("r10", in_chans=channels, image_size=size, norm=norm, width=0.5)
    method = UberNet(backbone, config, facts).train()
    for (
        name,
        parameter,
    ) in method.heads.named_parameters():  # classes start at zero, where the trunk learns nothing
        if name.endswith("classify.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    method.batches_seen = 1
    return method


def batch(n=8, size=24, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def labels(classes):
        return torch.randint(classes, (n,), generator=generator)

    images = torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    return Batch(images, labels(6), torch.arange(n), {name: labels(k) for name, k in COLUMNS.items()})


def hide(found, task, rows):
    """The batch without the labels of some rows."""
    if task == "label":
        labels = found.labels.clone()
        labels[rows] = -1
        return found._replace(labels=labels)
    column = found.targets[task].clone()
    column[rows] = -1
    return found._replace(targets={**found.targets, task: column})


def connect(method):
    """Optimizers as a run gives them."""
    optimizers = [method.optimizer_of(name).create(*ms) for name, ms in method.networks().items()]
    method.optimizers = lambda: optimizers
    return optimizers


def parameters(method, name):
    return [p for module in method.networks()[name] for p in module.parameters()]


# --- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [True, False])
def test_gradients_head_by_head_are_those_of_the_joint_sum(checkpointed):
    method = build(tasks=EIGHT, weights=(1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.1, 1.0), checkpointed=checkpointed)
    images = hide(hide(batch(), "label", [0, 3]), "group", [1, 2, 3, 4, 5])
    method = method.double()
    method.accumulate(images, method.generator())
    outputs = method.loss(images, method.generator())
    for index, name in enumerate(method.networks()):
        own = parameters(method, name)
        joint = torch.autograd.grad(outputs["loss"] * 8, own, retain_graph=True)
        flat = torch.cat([g.reshape(-1) for g in joint])
        found = method.get_buffer(f"gradient_{index}")
        assert float((found - flat).abs().max()) < 1e-6 * float(flat.abs().max()), name
    # what was counted: all images, and those that have a label of the task
    gray = int(method.counters[1 + EIGHT.index("color")])
    assert method.counters.tolist() == [8, 8, gray, 8, 8, 6, 3, 8, 8] and 0 < gray < 8


def test_the_trunk_computed_again_gives_the_same_gradients_with_a_random_depth():
    found = []
    for checkpointed in (True, False):
        method = build(checkpointed=checkpointed)
        dropout = torch.nn.Dropout(0.5)
        method.backbone.net.layer2.append(dropout)
        torch.manual_seed(3)
        method.accumulate(batch(), method.generator())
        found.append(method.gradient_0.clone())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0].any()


def test_the_joint_loss_counts_labels_and_not_their_lack():
    """By hand: sum over labeled images, over all images of the batch; an image without any label adds nothing."""
    method = build(tasks=("label", "group"))
    torch.nn.init.zeros_(method.heads["label"].classify.weight)
    torch.nn.init.zeros_(method.heads["group"].classify.weight)
    images = hide(hide(batch(), "label", [0, 1, 2, 3, 4, 5]), "group", list(range(8)))
    outputs = method.loss(images, method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(2 / 8 * torch.tensor(6.0).log().item(), rel=1e-6)
    assert float(outputs["label_loss"].detach()) == pytest.approx(torch.tensor(6.0).log().item(), rel=1e-6)
    assert float(outputs["group_loss"].detach()) == 0.0
    method.accumulate(images, method.generator())
    assert method.counters.tolist() == [2, 2, 0]  # the trunk too counts images that teach something


# --- memory --------------------------------------------------------------------------------------------------


def storages(values):
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class PeakMemory(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once, whatever the allocator does with them."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(storage).cdata for storage in storages((args, kwargs or {}))}
        for storage in storages(result):
            reference = StorageWeakRef(storage)
            if reference.cdata not in given:  # a view, or a buffer that is written to, is not new
                self.alive[reference.cdata] = (reference, storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class Wide(torch.nn.Module):
    """A class head with maps of its own: as large as one of a dense task."""

    def __init__(self, head, widths, hidden):
        super().__init__()
        self.dense = DenseHead(widths, hidden, head.classify.out_features)

    def forward(self, maps):
        return self.dense(maps).mean((2, 3))


def peak(tasks, step, checkpointed=True):
    hidden = 96
    method = build(size=32, tasks=tasks, checkpointed=checkpointed, hidden_dim=hidden)
    widths = [one.shape[1] for one in method.backbone.maps(torch.zeros(1, 3, 32, 32))]
    for index, (task, head) in enumerate(list(method.heads.items()), start=1):
        if isinstance(head, ClassHead):
            method.heads[task] = Wide(head, widths, hidden)
            size = sum(p.numel() for p in method.heads[task].parameters())
            method.register_buffer(f"gradient_{index}", torch.zeros(size))
    images = batch(32, size=32)
    with PeakMemory() as memory:
        step(method, images)
    return memory.peak


def one_by_one(method, images):
    method.accumulate(images, method.generator())


def jointly(method, images):
    method.loss(images, method.generator())["loss"].backward()


def test_peak_memory_with_eight_tasks_is_that_of_two():
    pair = ("edges", "rotation")  # one of each kind of head
    two, eight = peak(pair, one_by_one), peak(EIGHT, one_by_one)
    assert eight < 1.1 * two, (two, eight)
    # in the joint sum it is not: every head's maps are held until the end
    assert peak(EIGHT, jointly) > 1.8 * peak(pair, jointly)
    # and a trunk whose activations are held while heads are at work takes more
    assert peak(EIGHT, one_by_one, checkpointed=False) > eight


# --- asynchronous updates ------------------------------------------------------------------------------------


def test_each_network_moves_exactly_when_its_counter_is_full():
    method = build(tasks=("edges", "label"), head_batch=16, trunk_batch=24)
    connect(method)
    images = hide(batch(), "label", [0, 1, 2, 3])  # 4 of 8 have a label
    moved = {name: [] for name in method.networks()}
    for step in range(1, 13):
        before = {name: [p.clone() for p in parameters(method, name)] for name in moved}
        method.batches_seen = step
        method.accumulate(images, method.generator())
        method.update()
        for name, old in before.items():
            same = [torch.equal(p, q) for p, q in zip(parameters(method, name), old, strict=True)]
            assert all(same) or not any(same[:1])
            if not all(same):
                moved[name].append(step)
    # 8 images a batch: the trunk on every third, edges on every second, 4 labels a batch: on every fourth
    assert moved == {"trunk": [3, 6, 9, 12], "edges": [2, 4, 6, 8, 10, 12], "label": [4, 8, 12]}


def test_a_head_without_labels_stays_bit_by_bit_with_momentum_and_decay():
    method = build(tasks=("edges", "label"), head_batch=8, trunk_batch=8)
    optimizers = connect(method)
    for _ in range(2):  # momentum to go on with
        method.accumulate(batch(), method.generator())
        method.update()
    before = [p.clone() for p in parameters(method, "label")]
    momentum = [optimizers[2].state[p]["momentum_buffer"].clone() for p in parameters(method, "label")]
    for seed in range(3):
        method.accumulate(hide(batch(seed=seed), "label", list(range(8))), method.generator())
        method.update()
    for p, old, buffer in zip(parameters(method, "label"), before, momentum, strict=True):
        assert torch.equal(p, old) and torch.equal(optimizers[2].state[p]["momentum_buffer"], buffer)
    assert not method.counters[2] and not method.gradient_2.any()


def test_an_update_is_the_mean_over_the_images_counted():
    method = build(tasks=("label",), head_batch=10, trunk_batch=10)
    connect(method)
    own = parameters(method, "label")
    sums = [torch.zeros_like(p) for p in own]
    seen = 0
    for seed, hidden in ((1, [0, 1]), (2, [3])):  # 6 and 7 labels: 13 are counted, and 13 divide
        images = hide(batch(seed=seed), "label", hidden)
        loss = method.loss(images, method.generator())["loss"] * 8
        sums = [s + g for s, g in zip(sums, torch.autograd.grad(loss, own), strict=True)]
        method.accumulate(images, method.generator())
        seen += 8 - len(hidden)
        used = []
        step = method.optimizers()[1].step

        def looking(step=step, used=used):
            used.extend(p.grad.clone() for p in own)
            return step()

        method.optimizers()[1].step = looking
        method.update()
        method.optimizers()[1].step = step
    assert seen == 13 and len(used) == len(own)
    for gradient, total in zip(used, sums, strict=True):
        torch.testing.assert_close(gradient, total / 13, rtol=1e-5, atol=1e-7)


def test_with_equal_batches_and_all_labels_it_is_plain_synchronous_sgd():
    tasks = ("edges", "reconstruction", "rotation", "label", "group")
    method, plain = (build(tasks=tasks, head_batch=8, trunk_batch=8) for _ in range(2))
    connect(method)
    optimizer = method.facts.optimizer.create(plain)
    for step in range(1, 6):
        images = batch(seed=step)
        method.batches_seen = plain.batches_seen = step
        method.accumulate(images, method.generator())
        method.update()
        loss = plain.loss(images, plain.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, p), q in zip(method.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=0, atol=1e-6 * max(1.0, float(q.detach().abs().max())), msg=name
        )


def test_what_waits_is_in_the_checkpoint():
    method = build(head_batch=100, trunk_batch=100)
    connect(method)
    method.accumulate(batch(), method.generator())
    method.update()
    other = build(head_batch=100, trunk_batch=100)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.counters, method.counters) and other.counters[0] == 8
    assert torch.equal(other.gradient_0, method.gradient_0) and other.gradient_0.any()


# --- tasks ---------------------------------------------------------------------------------------------------


def test_edges_by_hand():
    step = torch.zeros(1, 1, 5, 6)
    step[..., 3:] = 1.0
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]).expand(1, 1, 5, 6)
    torch.testing.assert_close(edge_strength(step), expected)
    torch.testing.assert_close(edge_strength(step.mT), expected.mT)
    assert float(edge_strength(torch.full((1, 1, 4, 4), 0.7)).max()) < 1e-6


def test_values_are_of_each_image_and_leave_missing_classes_out():
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    values = task_values(logits, torch.tensor([1, -1]))
    torch.testing.assert_close(values, torch.tensor([2.0, 1.0]).log())
    maps = torch.arange(8.0).reshape(2, 1, 2, 2)
    torch.testing.assert_close(task_values(maps, torch.zeros_like(maps)), torch.tensor([14 / 4, 126 / 4]))


def test_the_color_is_told_of_images_that_are_shown_gray_and_had_one():
    method, images = build(gray_share=0.5), batch(64)
    gray = images.images.clone()
    gray[:8] = gray[:8, :1]  # these have none
    x, targets = method._prepare(images._replace(images=gray), None, method.generator())
    shown_gray = (x - x[:, :1]).abs().flatten(1).amax(1) < 1e-5
    told = targets["color"][1] == 0
    assert not told[:8].any() and torch.equal(told[8:], shown_gray[8:]) and 15 < int(told.sum()) < 45
    assert targets["color"][0].shape == (64, 2, 12, 12) and targets["color"][0].std() > 0


def test_each_image_is_turned_on_its_own_and_its_maps_with_it():
    method, images = build(gray_share=0.0), batch(16)
    x, targets = method._prepare(images, None, method.generator())
    turns = targets["rotation"][0]
    assert set(turns.tolist()) == {0, 1, 2, 3}
    upright = torch.stack([torch.rot90(one, -int(k), (1, 2)) for one, k in zip(x, turns, strict=True)])
    torch.testing.assert_close(upright, method.view(images.images))
    # the edges are those of what is shown: of the upright image, turned as it was
    edges = F.avg_pool2d(edge_strength(luma(images.images.float() / 255)), 2)  # maps are half as large
    for one, upright_edges, k in zip(targets["edges"][0], edges, turns.tolist(), strict=True):
        torch.testing.assert_close(one, 5 * torch.rot90(upright_edges, k, (1, 2)))
    assert targets["reconstruction"][0] is x


def test_tasks_that_are_impossible_are_refused():
    for wrong, message in (
        ({"tasks": ("depth",)}, "task 'depth'"),
        ({"tasks": ()}, "found none"),
        ({"tasks": ("edges", "edges")}, "each once"),
        ({"weights": (1.0,)}, "expected 5 weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**wrong)
    with pytest.raises(ConfigError, match="no color"):
        build(channels=1)
    build(channels=1, tasks=("edges", "rotation"))


def test_held_out_tasks_are_solved_above_chance():
    method = build(tasks=("edges", "rotation"), head_batch=16, trunk_batch=16)
    optimizer = Optimizer(lr=3e-3, weight_decay=0.0).create(method)

    def ramps(n, seed):  # bright above, dark below, with a bright square somewhere
        generator = torch.Generator().manual_seed(seed)
        x = torch.linspace(200, 40, 24)[:, None].expand(n, 3, 24, 24).clone()
        for row in range(n):
            top, left = torch.randint(16, (2,), generator=generator).tolist()
            x[row, :, top : top + 6, left : left + 6] = 255.0
        return Batch(x.to(torch.uint8), torch.zeros(n, dtype=torch.long), torch.arange(n))

    images = ramps(64, 0)
    for step in range(40):
        method.batches_seen = step + 1
        rows = torch.arange(16) + 16 * (step % 4)
        part = Batch(images.images[rows], images.labels[rows], rows)
        loss = method.loss(part, method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.eval()
    with torch.no_grad():
        found = {k: float(v) for k, v in method.pretext_metric(ramps(64, 1), None).items()}
    assert found["rotation_accuracy"] > 0.6 and found["edges_unexplained"] < 0.7  # by chance 1/4 and 1


def test_the_recipe_has_tasks_of_every_level_and_exports_the_trunk():
    config = recipes.recipe("ubernet")
    assert {"edges", "color", "reconstruction", "rotation", "group", "identity"} <= set(config.method.tasks)
    assert set(config.data.targets) == {"group", "identity"}
    method = build()
    assert method.encoder() is method.backbone
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in method.modules())
