"""Quantizers and nearest-code search against plain formulas in fp64, on one rank and on two."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtoken.visual_tokenizer.nearest import NearestCodeSearch
from dualtoken.visual_tokenizer.quantizer import MultiCodebookVQ, ResidualVQ
from tests.support.distributed import run_function
from tests.support.quantizer_ranks import (
    CODES,
    DEPTH,
    STEPS,
    WIDTH,
    latents,
    train,
    train_both_and_fill_one_slot_twice,
)

K, C, D = CODES, WIDTH, DEPTH


def rvq(shared=True, **kwargs):
    torch.manual_seed(0)
    return ResidualVQ(K, C, D, shared_codebook=shared, **kwargs).train()


def books_of(quantizer):
    """One codebook per depth in fp64."""
    return [quantizer.codebook[d % quantizer.num_codebooks].double() for d in range(D)]


def plain_residual_vq(z, books):
    """Return codes [N, D], each depth's input and the partial sums, in fp64 by the definition."""
    residual, total, codes, inputs, sums = z.double(), torch.zeros_like(z.double()), [], [], []
    for book in books:
        inputs.append(residual.clone())
        codes.append(((residual[:, None] - book[None]) ** 2).sum(-1).argmin(1))
        total = total + book[codes[-1]]
        residual = residual - book[codes[-1]]
        sums.append(total.clone())
    return torch.stack(codes, 1), inputs, sums


# -- search ------------------------------------------------------------------------------------------------


def test_search_agrees_with_fp64_on_ten_thousand_vectors():
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(4096, 32, generator=generator)
    vectors = torch.randn(10_000, 32, generator=generator) * torch.logspace(-3, 1, 10_000).unsqueeze(1)
    expected = torch.cat(
        [
            (0.5 * codebook.double().square().sum(1) - part.double() @ codebook.double().t()).argmin(1)
            for part in vectors.split(1000)
        ]
    )
    assert torch.equal(NearestCodeSearch(codebook)(vectors), expected)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 300),
    count=st.integers(0, 40),
    rows=st.integers(1, 50),
    tile=st.integers(1, 400),
    coarse=st.booleans(),
)
def test_search_in_any_tiling_takes_the_first_of_equal_codes(size, count, rows, tile, coarse):
    generator = torch.Generator().manual_seed(size)
    codebook = torch.randn(size, 3, generator=generator)
    vectors = torch.randn(count, 3, generator=generator)
    if coarse:  # whole numbers: many codes are equal, many vectors lie half-way between two
        codebook, vectors = codebook.round(), (2 * vectors).round() / 2
    expected = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = NearestCodeSearch(codebook, tile_rows=rows, tile_codes=tile)(vectors)
    assert torch.equal(found, expected.square().argmin(1))


def test_search_decides_near_ties_as_fp64_does():
    # Pairs of codes 1e-6 apart far from the origin: fp32 scores cannot tell them apart, fp64 can.
    generator = torch.Generator().manual_seed(0)
    base = 30 + torch.randn(200, 8, generator=generator)
    codebook = torch.cat([base, torch.nextafter(base, torch.full_like(base, 99.0))])
    vectors = base + 0.01 * torch.randn(200, 8, generator=generator)
    expected = torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    fp32 = (0.5 * codebook.square().sum(1) - vectors @ codebook.t()).argmin(1)
    assert not torch.equal(fp32, expected.argmin(1))  # the case is hard enough to matter
    assert torch.equal(NearestCodeSearch(codebook)(vectors), expected.argmin(1))


def test_search_ignores_autocast_and_reduced_matmul_precision():
    codebook, vectors = latents(200, seed=1), latents(500)
    expected = NearestCodeSearch(codebook)(vectors)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = NearestCodeSearch(codebook)(vectors)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(found, expected)
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # the newer way, unknown to the older
        assert torch.equal(NearestCodeSearch(codebook)(vectors), expected)
        products = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        assert [product.fp32_precision for product in products] == ["ieee", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_code_much_longer_than_the_others_makes_no_row_doubtful():
    codebook = latents(200, seed=1)
    codebook[7] *= 1e4
    vectors = torch.cat([0.1 * latents(500), codebook[7:8] + 1.0])
    search = NearestCodeSearch(codebook)
    assert search._search(vectors, search._memory())[1].float().mean() < 0.02
    assert torch.equal(search(vectors), torch.cdist(vectors.double(), codebook.double()).argmin(1))


def test_threads_search_at_once():
    search = NearestCodeSearch(latents(500, seed=1))
    batches = [latents(3000, seed=seed) for seed in range(4)]
    expected = [search(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found, codes in zip(threads.map(search, batches), expected, strict=True):
                assert torch.equal(found, codes)


@pytest.mark.parametrize("build", [rvq, lambda: MultiCodebookVQ(K, C, D).train()])
def test_codes_are_the_same_in_inference_mode_and_around_it(build):
    quantizer, z = build(), latents(50)
    expected = build().encode(z)
    with torch.inference_mode():
        assert torch.equal(quantizer.encode(z), expected)
        made = build()  # its buffers have no versions, which tell whether a search is still that of the codes
        assert torch.equal(made.encode(z), expected)
        made.codebook.neg_()
        assert torch.equal(made.encode(-z), expected)
    assert torch.equal(quantizer.encode(z), expected)
    quantizer(z.clone().requires_grad_()).quantized.sum().backward()
    quantizer.update()


def test_search_refuses_a_rounded_codebook():
    with pytest.raises(ValueError, match="torch.bfloat16; nearest-code search needs torch.float32"):
        NearestCodeSearch(latents(4).bfloat16())


# -- forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_residual_vq_follows_its_definition_with_gradients(shared):
    quantizer, z = rvq(shared), latents(2, 7).requires_grad_()
    weight = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(1))
    output = quantizer(z)
    (output.quantized * weight).sum().add(0.7 * output.commitment_loss).backward()

    reference = z.detach().reshape(-1, C).double().requires_grad_()
    codes, _, sums = plain_residual_vq(reference.detach(), books_of(quantizer))
    loss = torch.stack([(reference - partial).square().mean() for partial in sums]).mean()
    straight = reference + (sums[-1] - reference).detach()
    (straight * weight.reshape(-1, C)).sum().add(0.7 * loss).backward()

    assert output.codes.shape == (2, 7, D) and torch.equal(output.codes.reshape(-1, D), codes)
    torch.testing.assert_close(output.quantized.double().reshape(-1, C), sums[-1])
    torch.testing.assert_close(output.commitment_loss.double(), loss)
    torch.testing.assert_close(z.grad.double().reshape(-1, C), reference.grad, atol=1e-6, rtol=1e-5)


def test_gradient_flows_from_either_output_alone():
    for pick in ("quantized", "commitment_loss"):
        z = latents(5).requires_grad_()
        getattr(rvq()(z), pick).sum().backward()
        assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [rvq, lambda: rvq(False), lambda: MultiCodebookVQ(K, C, D).train()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looked_up_latents_equal_the_forward_bit_for_bit(build, dtype):
    quantizer, z = build(), latents(3, 50).to(dtype)
    for _ in range(3):  # also after the codebook has moved
        output = quantizer(z)
        torch.set_default_dtype(dtype)  # as programs that run other models in bf16 do
        try:
            assert torch.equal(quantizer.lookup(output.codes), output.quantized)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(quantizer.encode(z), output.codes)
        books = quantizer.additive_codebooks()
        rows = [books[d % len(books)][output.codes[..., d]] for d in range(D)]
        torch.testing.assert_close(sum(rows), output.quantized)
        quantizer.update()


def test_multi_codebook_vq_matches_directions():
    quantizer, z = MultiCodebookVQ(K, C, D).train(), latents(40).requires_grad_()
    output = quantizer(z)
    chunks = F.normalize(z.detach().double().view(40, D, C // D), dim=-1)
    similarity = torch.einsum("ndc,dkc->ndk", chunks, quantizer.codebook.double())
    assert torch.equal(output.codes, similarity.argmax(-1))
    torch.testing.assert_close(output.quantized.view(40, D, -1).norm(dim=-1), torch.ones(40, D))
    output.commitment_loss.backward()
    reference = z.detach().double().requires_grad_()
    target = output.quantized.detach().double().view(40, D, -1)
    loss = (F.normalize(reference.view(40, D, -1), dim=-1) - target).square().mean()
    loss.backward()
    torch.testing.assert_close(output.commitment_loss.double(), loss)
    torch.testing.assert_close(z.grad.double(), reference.grad, atol=1e-7, rtol=1e-5)
    quantizer.update()
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(D, K))


def test_a_forward_pass_never_moves_the_codebook_and_only_training_counts():
    quantizer, z = rvq(), latents(30)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    first = quantizer(z)
    window = quantizer.window.clone()
    quantizer.encode(z)
    quantizer.eval()
    second = quantizer(z)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.quantized, second.quantized)
    assert torch.equal(quantizer.window, window) and window.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert "window" not in before  # statistics live for one step and are not saved


# -- update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_update_equals_brute_force_over_depths_and_micro_batches(shared):
    quantizer = rvq(shared, restart_unused_codes=False, decay=0.9)
    size = torch.zeros(quantizer.num_codebooks, K, dtype=torch.float64)
    total = torch.zeros(quantizer.num_codebooks, K, C, dtype=torch.float64)
    for step in range(3):
        counts, sums = torch.zeros_like(size), torch.zeros_like(total)
        used = torch.zeros(D, K)
        for micro in range(2):
            z = latents(25, seed=10 * step + micro)
            codes, inputs, _ = plain_residual_vq(z, books_of(quantizer))
            for d in range(D):
                for row in range(len(z)):
                    book, code = d % quantizer.num_codebooks, codes[row, d]
                    counts[book, code] += 1
                    sums[book, code] += inputs[d][row]
                    used[d, code] += 1
            quantizer(z)
        old = quantizer.codebook.clone()
        stats = quantizer.update()
        size, total = 0.9 * size + 0.1 * counts, 0.9 * total + 0.1 * sums
        seen = size > 1e-5
        torch.testing.assert_close(quantizer.cluster_size.double(), size, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(quantizer.embed_sum.double(), total, atol=1e-6, rtol=1e-5)
        expected = total[seen] / size[seen].unsqueeze(1)
        torch.testing.assert_close(quantizer.codebook[seen].double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(quantizer.codebook[~seen], old[~seen])
        shares = used / 50
        assert stats.usage == pytest.approx((used > 0).float().mean(1).tolist())
        perplexity = [torch.distributions.Categorical(row).entropy().exp().item() for row in shares]
        assert stats.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert stats.codebook_usage == pytest.approx((counts > 0).double().mean().item())
        assert stats.restarted == 0 and not quantizer.window.any()


def test_unused_codes_restart_as_latents_of_the_batch():
    quantizer, z = rvq(restart_threshold=1.0, decay=0.5), latents(60)
    _, inputs, _ = plain_residual_vq(z, books_of(quantizer))
    codes = quantizer(z).codes
    counts = torch.bincount(codes.flatten(), minlength=K)
    stats = quantizer.update()
    dead = 0.5 * counts < 1.0
    assert 0 < dead.sum() == stats.restarted < K
    candidates = torch.cat(inputs).float()
    for code in dead.nonzero().flatten():
        gaps = (candidates - quantizer.codebook[0, code]).abs().amax(1)
        assert gaps.min() < 1e-6  # the residual that some depth was given, not noise
    assert (quantizer.cluster_size[0, dead] == 1.0).all()
    assert torch.equal(quantizer.cluster_size[0, ~dead], 0.5 * counts[~dead])


def test_few_latents_restart_many_codes_as_different_vectors():
    quantizer = ResidualVQ(64, C, D).train()
    quantizer(latents(4))
    assert quantizer.update().restarted == 64
    assert len(quantizer.codebook[0].unique(dim=0)) == 64


def test_residual_vq_learns_to_reconstruct():
    quantizer = ResidualVQ(64, C, D).train()
    error = []
    for step in range(60):
        z = 5 + latents(256, seed=step)  # far from where the codes start
        error.append((quantizer(z).quantized - z).square().mean().item())
        stats = quantizer.update()
    assert error[-1] < 0.2 < error[0]  # the variance of the latents is 1
    assert stats.codebook_usage > 0.9


def test_training_is_deterministic_under_a_seed():
    def trained(seed):
        torch.manual_seed(seed + 7)
        quantizer = ResidualVQ(K, C, D, seed=seed).train()
        for step in range(3):
            torch.manual_seed(step)  # whatever the global generator does
            quantizer(latents(40, seed=step))
            quantizer.update()
        return quantizer.codebook

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_saved_state_continues_as_if_never_interrupted():
    quantizer = rvq()
    copy = rvq()
    for step in range(4):
        if step == 2:
            copy.load_state_dict(quantizer.state_dict())
        for each in (quantizer, copy) if step >= 2 else (quantizer,):
            each(latents(20, seed=step))
            each.update()
    assert torch.equal(quantizer.codebook, copy.codebook)


def test_a_skipped_step_and_a_frozen_codebook_leave_no_trace():
    quantizer, other = rvq(), rvq()
    quantizer(latents(20, seed=5))
    quantizer.reset_window()
    for each in (quantizer, other):
        each(latents(20))
        each.update()
    assert torch.equal(quantizer.codebook, other.codebook)
    quantizer.frozen = True
    quantizer(latents(20))
    assert not quantizer.window.any()


# -- two ranks ---------------------------------------------------------------------------------------------


def test_two_ranks_equal_one_rank_with_twice_the_micro_batches():
    (first, error), (second, _) = run_function(train_both_and_fill_one_slot_twice, timeout=180)
    assert "latent codebook: several ranks filled the same candidate slot" in error
    for kind in ("rvq", "mcq"):
        (one, stats, collectives), (two, other_stats, _), (alone, alone_stats, none) = (
            first[kind],
            second[kind],
            train(kind),
        )
        for key, value in alone.items():
            assert torch.equal(one[key], two[key]), key  # the ranks agree to the last bit
            torch.testing.assert_close(one[key], value, atol=1e-6, rtol=1e-5)
        assert stats == other_stats
        assert [s.usage for s in stats] == [s.usage for s in alone_stats]
        assert [s.restarted for s in stats] == [s.restarted for s in alone_stats]
        assert sum(s.restarted for s in stats) > 0
        assert collectives == STEPS and none == 0  # one per update


# -- precision and refusals --------------------------------------------------------------------------------


def test_codebooks_stay_fp32_and_unrounded_through_casts():
    quantizer = rvq()
    quantizer(latents(20))
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    torch.nn.Sequential(quantizer).bfloat16().half().double()
    for name, buffer in quantizer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", [rvq, lambda **kw: MultiCodebookVQ(K, C, D, **kw)])
def test_broken_latents_are_named(build, bad):
    z = latents(4)
    z[2, 1] = bad
    with pytest.raises(ValueError, match=r"pixel latents contain NaN or infinity \(1 of 24 values\)"):
        build(name="pixel")(z)


def test_wrong_use_is_explained():
    quantizer = rvq()
    with pytest.raises(RuntimeError, match="latent codebook: no vectors since the last update"):
        quantizer.update()
    with pytest.raises(ValueError, match="latents are 5 wide, expected 6"):
        quantizer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 16\], expected \[0, 15\]"):
        quantizer.lookup(torch.tensor([[0, 16, 3]]))
    with pytest.raises(ValueError, match="codes are 2 deep, expected 3"):
        quantizer.lookup(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no candidate slot 2 of 2"):
        quantizer.set_candidate_slot(2, 2)
    with pytest.raises(ValueError, match="cannot be cut into 4 equal chunks"):
        MultiCodebookVQ(K, 6, 4)
