"""Small tensors joined into rows and taken apart again."""

from __future__ import annotations

import torch

from kernels.rows import join_rows, shapes_text, split_rows

XS = [torch.arange(24.0).reshape(4, 6), torch.tensor([7.0, 8.0]), torch.arange(16.0).reshape(2, 2, 4)]
DIMS = "1,0,2"


def test_rows_hold_the_parts_of_every_tensor():
    rows = join_rows(XS, 2, DIMS)
    want = torch.cat([XS[0][:, 3:].reshape(-1), XS[1][1:], XS[2][..., 2:].reshape(-1)])
    assert torch.equal(rows[1], want)


def test_what_was_joined_splits_into_the_same():
    for n in (1, 2):
        back = split_rows(join_rows(XS, n, DIMS), DIMS, shapes_text([x.shape for x in XS]))
        assert all(torch.equal(a, b) for a, b in zip(back, XS, strict=True))


def test_scalars_travel_too():
    xs = [torch.tensor(1.0), torch.tensor(2.0)]
    rows = join_rows(xs, 1, "0,0")
    assert rows.shape == (1, 2)
    assert [float(x) for x in split_rows(rows, "0,0", shapes_text([x.shape for x in xs]))] == [1.0, 2.0]
