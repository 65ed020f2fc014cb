"""Our side of the guide's table of calls runs as written."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sknbln
from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "coming_from.md"


def our_calls():
    """The code in the rows of "sknbln", from "The same call in each tool"."""
    table = PAGE.read_text().split("## The same call in each tool")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    calls = [row[2] for row in rows if len(row) == 3 and row[1].startswith("sknbln")]
    return [re.findall(r"`([^`]+)`", call) for call in calls]


@pytest.mark.filterwarnings("ignore")  # about a small and homogeneous example, not about the calls
def test_our_calls_run():
    anndata = pytest.importorskip("anndata")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        make_nbln_counts(n_cells=120, n_genes=16, n_factors=2, random_state=0).data.toarray(),
        columns=[f"g{i}" for i in range(16)],
    )
    obs = pd.DataFrame(
        {
            "batch": rng.choice(["a", "b"], 120),
            "group": np.repeat(["case", "control"], 60),
            "donor": np.repeat([f"d{i}" for i in range(8)], 15),
        }
    )
    obs.index = obs.index.astype(str)
    adata = anndata.AnnData(frame.to_numpy(float), obs=obs, var=pd.DataFrame(index=frame.columns))
    adata.layers["counts"] = adata.X.copy()
    names = dict(
        np=np,
        sknbln=sknbln,
        NBLNEstimator=NBLNEstimator,
        NBVCPEstimator=NBVCPEstimator,
        X=frame,
        X_new=frame[:20],
        obs=obs,
        obs_new=obs[:20],
        depth=np.full(120, 2.0),
        adata=adata,
        new=adata[:20].copy(),
        genes=["g0", "g1", "g2"],
    )
    calls = our_calls()
    assert len(calls) >= 10
    for call in calls:
        names["model"] = NBLNEstimator(random_state=0).fit(frame)
        for code in call:
            if "covariates=obs_new" in code:
                names["model"] = NBLNEstimator(random_state=0).fit(frame, covariates=obs[["batch"]])
            exec(code, names)
