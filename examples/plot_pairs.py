"""
Which genes move together within one cell type
==============================================

Between cell types every marker gene correlates with every other. What is asked here is what moves
together *within* CD8+ T cells: which pairs of genes are more than chance, how strongly they
correlate and how sure that is, which modules they form, and which pairs are direct.
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from sknbln import NBLNEstimator
from sknbln.datasets import load_immune_cells
from sknbln.network import sparse_network
from sknbln.plotting import CorrelationDisplay, NetworkDisplay, VolcanoDisplay

cells = load_immune_cells(as_frame=True)
X = cells.data[cells.target == "T_cells_CD8+"]
model = NBLNEstimator(random_state=0).fit(X)

# %%
# A test first. It is a score test at the fit of *independent* genes, so that nothing of the factor
# model has a say in it: the p-value is the probability that independent genes with this capture
# look like that. Correlations and their intervals stand beside.
test = model.correlation_test(X, scale="expression")
pairs = test.to_frame(q=0.05)
print(f"{len(pairs)} of {len(test.to_frame())} pairs at a false discovery rate of 5 %")
print(pairs.head(10).round(3).to_string(index=False))

# %%
# Small p-values and strong correlations are two things. Genes with many counts show weak
# correlations clearly.
VolcanoDisplay.from_test(test)
plt.show()

# %%
# The genes with the most such pairs, neighbours in a hierarchical clustering side by side. Pairs
# below the q are marked: colour without points is what a factor model has an opinion on, and the
# counts alone do not show.
degree = np.nansum(test.q_value <= 0.05, axis=1)
linked = test.genes[np.argsort(-degree, kind="stable")[:40]]
CorrelationDisplay.from_estimator(model, scale="expression", test=test, genes=linked)
plt.show()

# %%
# Modules: average linkage of the same correlations, cut at .2.
R = model.get_correlation("expression", genes=linked)
tree = linkage(squareform(1 - R.to_numpy(), checks=False), "average")
module = fcluster(tree, 0.8, "distance")
for label in np.unique(module):
    members = linked[module == label]
    if members.size > 2:
        print(f"module of {members.size}: {', '.join(members)}")

# %%
# Direct pairs: partial correlations by the graphical lasso. A pair that only moves together
# because a third gene moves both has none. The penalty is the smallest at which fits to halves of
# the cells agree on the edges.
network = sparse_network(model, X, genes=linked, scale="expression", n_halves=6)
print(network.edges().head(10).round(2).to_string(index=False))
NetworkDisplay.from_network(network)
plt.show()
