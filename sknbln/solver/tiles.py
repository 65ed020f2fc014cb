"""Genes in tiles: a pass over the genes of a block of cells reads and writes one tile after the other.

The arrays of one tile stay in the cache of a processor, and the products of the loadings are read once for
all cells of a block. Functions of a tile are those of all genes: sums over genes become sums over the tile,
which add up.
"""

import jax
import jax.numpy as jnp

from .lowrank import Factors
from .params import Params

#: log-rate of the genes that fill the last tile: their expectation is 0
_NEVER = -1000.0


class GeneTiles:
    """The parameters of all genes, tiles first.

    Parameters
    ----------
    params : Params
        In the model's own units.
    largest : int or None
        Number of genes in a tile, at most. None puts all genes into one tile.
    """

    def __init__(self, params, largest=None):
        n = params.mean.shape[0]
        self.n_genes, self.n_tiles = n, 1 if largest is None else max(-(-n // largest), 1)
        self.size = -(-n // self.n_tiles)
        self.k = params.loadings.shape[1]
        factors = Factors.of(params.loadings)
        first = Params(*(self.split(a, 0) for a in params))
        self.params = first._replace(mean=self.split(params.mean, 0, _NEVER))
        self.factors = Factors(
            columns=self.split(factors.columns, 0),
            rows=self.split(factors.rows, 1),
            pairs=self.split(factors.pairs, 0),
            weighted_pairs=self.split(factors.weighted_pairs, 1),
        )

    def split(self, a, axis=1, value=0.0):
        """The array, whose ``axis`` is that of the genes, in tiles: (n_tiles, ...)."""
        short = self.n_tiles * self.size - self.n_genes
        if short:
            widths = [(0, short if i == axis else 0) for i in range(a.ndim)]
            a = jnp.pad(a, widths, constant_values=value)
        shape = *a.shape[:axis], self.n_tiles, self.size, *a.shape[axis + 1 :]
        return jnp.moveaxis(a.reshape(shape), axis, 0)

    def join(self, a, axis=1):
        """The inverse of `split`."""
        a = jnp.moveaxis(a, 0, axis)
        a = a.reshape(*a.shape[:axis], self.n_tiles * self.size, *a.shape[axis + 2 :])
        return jax.lax.slice_in_dim(a, 0, self.n_genes, axis=axis)

    def of(self, cells):
        """The cells with their counts and exposures in tiles; what is not by gene stays."""
        exposure = cells.exposure
        if exposure.shape[1] == self.n_genes:
            exposure = self.split(exposure)
        else:
            exposure = jnp.broadcast_to(exposure, (self.n_tiles, *exposure.shape))
        return cells._replace(counts=self.split(cells.counts), exposure=exposure)

    def each(self, function, cells, *by_gene):
        """``function(cells, params, factors, *by_gene)`` of each tile.

        ``cells`` are those of :meth:`of`, ``by_gene`` other arrays in tiles. The function returns sums over
        the genes of a tile, which are added up, and arrays by gene, which are put together, tiles first.
        """

        def of_tile(tile):
            counts, exposure, params, factors, *own = tile
            part = cells._replace(counts=counts, exposure=exposure)
            return function(part, params, factors, *own)

        tiles = cells.counts, cells.exposure, self.params, self.factors, *by_gene
        if self.n_tiles == 1:
            sums, arrays = of_tile(jax.tree.map(lambda a: a[0], tiles))
            return sums, jax.tree.map(lambda a: a[None], arrays)
        sums, arrays = jax.lax.map(of_tile, tiles)
        return jax.tree.map(lambda a: a.sum(0), sums), arrays
