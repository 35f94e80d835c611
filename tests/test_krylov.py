"""Block Krylov truncation, PiSSA and MiLoRA against full SVDs in fp64 and PEFT's own pissa."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn

import lora_init
from lora_init import LoraInitError
from lora_init.solve import krylov
from lora_init.solve.krylov import FLOOR
from lora_init.testing import misaligned, transposed


def spectrum(values, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values and random singular vectors, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(n: int) -> torch.Tensor:
        draw = torch.randn(n, len(values), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(draw)[0]

    S = torch.tensor(values, dtype=torch.float64)
    return ((orthonormal(rows) * S) @ orthonormal(columns).T).float()


def gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


SPECTRA = {
    "gaussian": lambda: gaussian(300, 300),
    "wide": lambda: gaussian(120, 500),
    "tall": lambda: gaussian(500, 70),
    "slow_decay": lambda: spectrum([i**-0.5 for i in range(1, 301)], 300, 300),
    "fast_decay": lambda: spectrum([i**-2.0 for i in range(1, 301)], 300, 300),
    "flat": lambda: spectrum([1.0] * 300, 300, 300),
    "clustered": lambda: spectrum([1.0] * 20 + [0.9] * 20 + [0.1] * 260, 300, 300),
    "one_huge": lambda: spectrum([1e3, *[1.0] * 4, *[0.5] * 295], 300, 300),
    # needs the Gram matrix of all products, not only of neighbouring blocks
    "two_huge": lambda: spectrum([1e4, 3e3, *[1.0] * 4, *[0.5] * 294], 300, 300),
    "rank_5": lambda: spectrum([1.0] * 5, 300, 200),
    "rank_1": lambda: spectrum([2.0], 40, 50),
    "equal_columns": lambda: gaussian(60, 1).expand(60, 80).contiguous(),
    "zero": lambda: torch.zeros(30, 40),
    "row": lambda: gaussian(1, 50),
    "column": lambda: gaussian(50, 1),
}

POWERS = [0.1, 2.0, 0.3, 0.5, 1.0, 0.2, 1.5, 0.4, 3.0, 0.7, 0.0]


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def truncate(weights, ranks, generators, *args, **options):
    energies = [float(weight.double().square().sum()) for weight in weights]
    return krylov.truncate(weights, ranks, generators, energies, *args, **options)


def excess(weight: torch.Tensor, product: torch.Tensor, r: int) -> float:
    """True (loss − minimum) / max(minimum, FLOOR·‖W‖²) in fp64."""
    squares = torch.linalg.svdvals(weight.double()).square()
    loss = (weight.double() - product.double()).square().sum()
    scale = max(float(squares[r:].sum()), FLOOR * float(squares.sum()), 1e-300)
    return float(loss - squares[r:].sum()) / scale


def product(truncation) -> torch.Tensor:
    return (truncation.U.double() * truncation.S.double()) @ truncation.V.double().T


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    with safe_open(minilm_dir / "model.safetensors", framework="pt") as file:
        names = [n for n in file.keys() if n.endswith(("query.weight", "value.weight"))]  # noqa: SIM118
        return {name.removesuffix(".weight"): file.get_tensor(name) for name in names}


@pytest.mark.parametrize("r", [1, 8, 32])
@pytest.mark.parametrize("make", SPECTRA.values(), ids=SPECTRA)
def test_loss_is_the_minimum_to_the_tolerance(make, r):
    weight = make()
    r = min(r, *weight.shape)
    for tol in (1e-2, 1e-4):
        (result,) = truncate([weight], [r], seeded(1), tol)
        truth = excess(weight, product(result), r)
        assert result.info["converged"]
        assert truth <= tol
        assert result.info["excess"] <= tol


@pytest.mark.parametrize("tol", [1e-3, 1e-4])
@pytest.mark.parametrize("r", [8, 32])
def test_the_estimate_is_within_three_times_the_truth(minilm, r, tol):
    weights = [*minilm.values(), SPECTRA["slow_decay"](), gaussian(600, 600)]
    results = truncate(weights, [r] * len(weights), seeded(len(weights)), tol)
    for weight, result in zip(weights, results, strict=True):
        truth = excess(weight, product(result), r)
        assert truth <= tol
        assert truth / 3 <= result.info["excess"] <= 3 * truth


@pytest.mark.parametrize("name", ["slow_decay", "fast_decay"])
def test_product_equals_the_truncated_svd_where_a_gap_allows(name):
    weight = SPECTRA[name]()
    (result,) = truncate([weight], [8], seeded(1), tol=1e-9)
    U, S, Vh = torch.linalg.svd(weight.double())
    expected = (U[:, :8] * S[:8]) @ Vh[:8]
    assert (product(result) - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(result.S.double(), S[:8], rtol=1e-5, atol=0)
    for basis in (result.U, result.V):
        gram = basis.double().T @ basis.double()
        assert (gram - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-5


def test_directions_beyond_the_rank_are_exactly_zero():
    (result,) = truncate([SPECTRA["rank_5"]()], [8], seeded(1))
    assert (result.S[:5] > 0.99).all()
    assert (result.S[5:] < 1e-6).all()
    (result,) = truncate([torch.zeros(30, 40)], [8], seeded(1))
    assert not result.S.any()
    assert result.V.isfinite().all()
    assert result.U.isfinite().all()


def test_bits_depend_on_nothing_else():
    weights = [gaussian(90, 130), gaussian(700, 600), gaussian(64, 64), gaussian(33, 200)]
    ranks = [4, 8, 8, 3]

    def run(indices, weights=weights):
        generators = seeded(4)
        picked = [weights[i] for i in indices], [ranks[i] for i in indices]
        results = truncate(*picked, [generators[i] for i in indices])
        return {i: (x.U, x.S, x.V) for i, x in zip(indices, results, strict=True)}

    expected = run(range(4))
    others = [run([3, 1, 0, 2]), *(run([i]) for i in range(4))]
    for threads in (1, 4):
        torch.set_num_threads(threads)
        others.append(run(range(4)))
    others.append(run(range(4), [misaligned(w) for w in weights]))
    others.append(run(range(4), [transposed(w) for w in weights]))
    for other in others:
        for i, tensors in other.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected[i], strict=True))
    halves = [w.bfloat16() for w in weights]
    for i, tensors in run(range(4), halves).items():
        same = run([i], [w.float() for w in halves])[i]
        assert all(torch.equal(a, b) for a, b in zip(tensors, same, strict=True))


def test_on_a_gpu_every_product_is_of_so_many_matrices(monkeypatch):
    """cuBLAS's bits may depend on their number: layers alone and in company see the same one."""
    monkeypatch.setattr(krylov, "_step", lambda device: 4)
    calls: set[int] = set()
    bmm = torch.bmm

    def spy(a, b):
        calls.add(len(a))
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", spy)
    # they end after different numbers of reads, so that layers move to other places
    weights = [spectrum([i**-p for i in range(1, 97)], 96, 112, i) for i, p in enumerate(POWERS)]
    together = truncate(weights, [8] * len(weights), seeded(len(weights)))
    assert len({result.info["reads"] for result in together}) > 2
    for i, result in enumerate(together):
        (alone,) = truncate([weights[i]], [8], [seeded(len(weights))[i]])
        assert alone.info | {"seconds": 0} == result.info | {"seconds": 0}
        for name in ("U", "S", "V"):
            assert torch.equal(getattr(alone, name), getattr(result, name))
        assert excess(weights[i], product(result), 8) <= 1e-4
    assert calls == {4}


@pytest.mark.parametrize("r", [8, 32])
def test_few_reads_on_real_weights(minilm, r):
    factors = lora_init.approximate(minilm, r=r, method="pissa")
    reads = [f.info["reads"] for f in factors.values()]
    worst = max(excess(minilm[n], f.B.double() @ f.A.double(), r) for n, f in factors.items())
    assert worst <= 1e-4
    assert max(reads) <= 12
    assert sum(reads) / len(reads) <= 10


def test_inilora_krylov_is_the_minimum_near_adams_end_point(minilm):
    solved, adam, pissa = (
        lora_init.approximate(minilm, r=8, cache=False, **options)
        for options in ({"solver": "krylov"}, {"solver": "adam"}, {"method": "pissa"})
    )
    near: list[float] = []
    far: list[float] = []
    for name, other in adam.items():
        A, B = solved[name].A.double(), solved[name].B.double()
        assert excess(minilm[name], B @ A, 8) <= 1e-4
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-5)  # balanced
        size = other.A.norm() ** 2 + other.B.norm() ** 2
        for gaps, one in ((near, solved[name]), (far, pissa[name])):
            gap = (one.A - other.A).norm() ** 2 + (one.B - other.B).norm() ** 2
            gaps.append(float((gap / size).sqrt()))
    # METHODS.md: 0.55–0.75 over four cases, PiSSA's own gauge 1.29–1.47
    assert sum(near) / len(near) < 0.75
    assert sum(far) / len(far) > 1.29


def test_krylov_product_does_not_depend_on_the_scaling(minilm):
    name, weight = next(iter(minilm.items()))
    options = {"r": 8, "solver": "krylov", "cache": False}
    one = lora_init.approximate({name: weight}, **options)[name]
    two = lora_init.approximate({name: weight}, scaling=4.0, **options)[name]
    assert two.scaling == 4.0
    torch.testing.assert_close(4.0 * (two.B @ two.A), one.B @ one.A, rtol=1e-5, atol=1e-6)


class Toy(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight.clone())

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
def test_pissa_is_pefts(use_rslora):
    base = Toy(SPECTRA["slow_decay"]())
    config = {"r": 8, "lora_alpha": 4, "target_modules": ["layer"], "use_rslora": use_rslora}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights="pissa", **config))
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    lora_init.initialize(ours, "pissa", tol=1e-9)
    mine, other = ours.base_model.model.layer, theirs.base_model.model.layer
    gap = (mine.get_base_layer().weight - other.get_base_layer().weight).abs().max()
    assert gap < 2e-6  # theirs is an SVD in fp32, of σ₁ = 1
    A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
    sign = torch.where((mine.lora_A["default"].weight * A).sum(1) < 0, -1.0, 1.0)
    torch.testing.assert_close(mine.lora_A["default"].weight, sign[:, None] * A, rtol=0, atol=1e-4)
    torch.testing.assert_close(mine.lora_B["default"].weight, sign * B, rtol=0, atol=1e-4)


def test_pissa_signs_are_fixed():
    factors = lora_init.approximate({"w": SPECTRA["slow_decay"]()}, r=4, method="pissa")["w"]
    assert (factors.B.gather(0, factors.B.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("name", SPECTRA)
def test_milora_takes_the_smallest_triplets(name):
    weight = SPECTRA[name]()
    r = min(8, *weight.shape)
    factors = lora_init.approximate({"w": weight}, r=r, method="milora", scaling=2.0, cache=False)
    kept = weight.double() - 2.0 * factors["w"].B.double() @ factors["w"].A.double()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (U[:, : len(S) - r] * S[: len(S) - r]) @ Vh[: len(S) - r]
    # the smallest triplets of a flat or clustered end are any of it: compare what is left in norm
    assert kept.norm().item() == pytest.approx(expected.norm().item(), abs=1e-6 * S[0].item())
    if name in ("gaussian", "wide", "tall", "slow_decay"):
        assert (kept - expected).norm() < 1e-6 * S[0]


@pytest.mark.parametrize("name", ["gaussian", "wide", "tall", "slow_decay", "clustered"])
def test_pissa_and_milora_together_rebuild_the_weight(name):
    weight = SPECTRA[name]()[:60, :60].contiguous()
    both = [
        lora_init.approximate({"w": weight}, r=30, method=method, cache=False)["w"]
        for method in ("pissa", "milora")
    ]
    rebuilt = sum(f.B.double() @ f.A.double() for f in both)
    assert (rebuilt - weight).norm() < 2e-2 * weight.norm()  # tol 1e-4 of a squared norm, twice


def test_giving_up_is_said():
    generators = seeded(1)
    (result,) = truncate([gaussian(300, 300)], [8], generators, max_reads=5)
    assert result.info["reads"] == 5
    assert not result.info["converged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pissa", "tol": 0}, "pissa: tol must be a number > 0, got 0"),
        ({"method": "inilora", "solver": "svd"}, "solver must be one of adam, gd, krylov"),
        ({"method": "milora", "tol": 1}, "milora has no option 'tol'"),
    ],
    ids=["tol", "solver", "option"],
)
def test_bad_options(options, message):
    with pytest.raises(LoraInitError, match=message):
        lora_init.approximate({"w": gaussian(20, 20)}, r=4, **options)
