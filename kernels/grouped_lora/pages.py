"""Low-rank weights paged by rank: an adapter holds only the pages its true rank needs."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RankPages:
    """The low-rank weights of every slot at one site, in pools that all sites of a width share.

    A page holds PAGE rank rows. Rank row j of a slot is row j % PAGE of page `pages[slot, j // PAGE]`. Rows of the last
    page beyond the true rank, and page table entries beyond the last page, may hold anything: they are never read.

    Attributes:
        a_pool: [num_pages, PAGE, in], rows of A.
        b_pool: [num_pages, PAGE, out], columns of B (B is stored transposed); every scale is folded into it.
        a_pages: int32 [slots, max_pages], pages of `a_pool`.
        b_pages: int32 [slots, max_pages], pages of `b_pool`.
        ranks: int32 [slots], the true rank; 0 where a slot has nothing at this site.
        max_rank: a host bound on `ranks`.
    """

    a_pool: Tensor
    b_pool: Tensor
    a_pages: Tensor
    b_pages: Tensor
    ranks: Tensor
    max_rank: int

    @property
    def page_size(self) -> int:
        """Rank rows of a page."""
        return self.a_pool.shape[1]


def rank_rows(pool: Tensor, pages: Tensor, rank: int) -> Tensor:
    """One slot's [rank, width] rows: its int32 [max_pages] `pages` gathered from a [num_pages, PAGE, width] pool."""
    used = pages[: -(-rank // pool.shape[1])].long()
    return pool.index_select(0, used).flatten(0, 1)[:rank]
