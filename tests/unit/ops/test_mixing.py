"""The table of a router that mixes: what it says of each expert, and what of it is left with some of them."""

from __future__ import annotations

import pytest
import torch

from coterie.ops.mixing import check_ranks, matrix_of, mixing_of, of_some, sizes_of

TABLE = torch.tensor([[1.0, 0.0, 20.0, 0.0], [-0.5, 0.0, 10.0, 0.0], [0.25, -40.0, 0.0, 0.0]])


def test_the_matrix_is_the_weights_and_a_tenth_of_what_is_mixed() -> None:
    wanted = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.5, 0.0], [-4.0, 0.0, 0.25]])
    torch.testing.assert_close(matrix_of(TABLE), wanted)


def test_beside_other_experts_nothing_is_mixed() -> None:
    around = mixing_of(TABLE, 6, first=2)
    torch.testing.assert_close(around[2:5, 2:5], matrix_of(TABLE) - torch.diag(TABLE[:, 0]))
    around[2:5, 2:5] = 0
    assert not around.any()


def test_an_expert_counts_by_what_reaches_its_b_and_what_its_a_gives() -> None:
    torch.testing.assert_close(sizes_of(TABLE), torch.tensor([(3 + 5) / 2, (0.5 + 2.5) / 2, (4.25 + 0.25) / 2]))
    alone = torch.cat([TABLE[:, :1], torch.zeros(3, 3)], dim=1)
    torch.testing.assert_close(sizes_of(alone), TABLE[:, 0].abs())


def test_the_router_of_some_experts_mixes_them_alone() -> None:
    torch.testing.assert_close(matrix_of(of_some(TABLE, [0, 2])), matrix_of(TABLE)[[0, 2]][:, [0, 2]])


def test_experts_of_more_ranks_are_refused() -> None:
    check_ranks([1, 1])
    check_ranks([])  # the fresh expert is alone
    with pytest.raises(ValueError, match="experts of rank 1"):
        check_ranks([1, 2])
