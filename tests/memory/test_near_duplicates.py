import torch

from lightning_dvc.memory.near_duplicates import N_TABLES, NearDuplicates


def draw(n, seed, d=32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def filled():
    near = NearDuplicates(max_angle=0.1, seed=0)
    x = draw(300, 0)
    near.add(torch.arange(300), near.codes(x))
    return near, x


def test_slightly_changed_copies_are_known_and_others_are_not():
    near, x = filled()
    copies = x[:100] + 0.03 * draw(100, 1)
    assert near.known(near.codes(copies)).float().mean() > 0.97
    assert not near.known(near.codes(draw(300, 2))).any()


def pairs_of(repeats):
    """All pairs of positions that nearly repeat each other."""
    looks, alike = repeats.look.tolist(), {tuple(sorted(pair)) for pair in repeats.pairs.tolist()}
    return {
        (i, j)
        for j in range(len(looks))
        for i in range(j)
        if looks[i] == looks[j] or tuple(sorted((looks[i], looks[j]))) in alike
    }


def test_repeats_among_candidates_are_found():
    near, _ = filled()
    x = draw(50, 3)
    changed = x[5:7] + 0.03 * draw(2, 5)
    repeats = near.among(near.codes(torch.cat([x, x[:5], x[:1], changed])))
    exact = {(0, 50), (0, 55), (50, 55), (1, 51), (2, 52), (3, 53), (4, 54)}
    assert pairs_of(repeats) == exact | {(5, 56), (6, 57)}
    assert 1 <= len(repeats.pairs) <= 2  # copies make none
    assert torch.nonzero(repeats.any()).flatten().tolist() == [*range(7), *range(50, 58)]


def test_thousands_of_copies_make_no_pairs():
    near, x = filled()
    codes = near.codes(torch.cat([x[:1].expand(20_000, -1), draw(3, 6)]))
    repeats = near.among(codes)
    assert repeats.pairs.shape == (0, 2)
    assert len(repeats.look[:20_000].unique()) == 1
    assert repeats.any().tolist() == [True] * 20_000 + [False] * 3
    near.add(torch.arange(1000, 21_000), codes[:20_000])
    assert near.known(codes).tolist() == [True] * 20_000 + [False] * 3


def test_what_is_forgotten_is_not_known():
    near, x = filled()
    near.forget(torch.tensor([3, 5, 999]))
    assert len(near) == 298
    known = near.known(near.codes(x))
    assert torch.nonzero(~known).flatten().tolist() == [3, 5]


def test_ids_that_are_held_keep_their_codes():
    near, x = filled()
    near.add(torch.tensor([7, 400]), near.codes(draw(2, 4)))
    assert len(near) == 301
    assert near.known(near.codes(x[7:8])).all()


def test_the_centre_stays_where_the_first_batch_was():
    near, x = filled()
    far = near.codes(x[:1] + 100)
    assert torch.equal(far, near.codes(x[:1] + 100))
    assert not near.known(far).any()


def test_state_survives_a_file(tmp_path):
    near, x = filled()
    torch.save(near.state_dict(), tmp_path / "state.pt")
    again = NearDuplicates(max_angle=0.1, seed=0)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.codes(x), near.codes(x))
    assert again.known(again.codes(x)).all()


def test_nothing_held_and_nothing_asked():
    near = NearDuplicates(max_angle=0.1, seed=0)
    codes = near.codes(draw(2, 0))
    assert not near.known(codes).any()
    none = torch.empty(0, N_TABLES, dtype=torch.int64)
    near.add(torch.empty(0, dtype=torch.int64), none)
    assert pairs_of(near.among(none)) == set()
    assert near.among(none).any().shape == (0,)
