"""
Counts that are not cells: words
================================

Texts give the same kind of matrix: documents are rows, words are columns, most entries are zero,
documents have unequal lengths, and words come in bursts. Here the documents are docstrings of
Python's standard library, which every reader has installed. The numbers therefore depend slightly
on the version of Python.
"""

import importlib
import inspect
import re
import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.plotting import EmbeddingDisplay, LoadingsSpectrumDisplay

themes = {
    "numbers": ["decimal", "fractions", "math", "random", "statistics", "cmath", "heapq"],
    "files": ["os", "pathlib", "shutil", "tarfile", "tempfile", "zipfile", "glob"],
    "network": ["email.message", "http.client", "imaplib", "smtplib", "socket", "urllib.request"],
    "concurrency": [
        "asyncio",
        "concurrent.futures",
        "multiprocessing.pool",
        "queue",
        "threading",
        "subprocess",
    ],
}


def docstrings(module):
    """Docstrings of a module's public functions, classes and their methods, each once."""
    found = set()
    for name, thing in vars(module).items():
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        found.add(thing.__doc__)
        if inspect.isclass(thing):
            found.update(
                member.__doc__
                for label, member in vars(thing).items()
                if inspect.isroutine(member) and not label.startswith("_")
            )
    return sorted(text for text in found if text and len(re.findall(r"[a-z]{3,}", text)) >= 15)


texts, labels, seen = [], [], set()
for theme, modules in themes.items():
    for name in modules:
        for text in docstrings(importlib.import_module(name)):
            if text not in seen:
                seen.add(text)
                texts.append(text)
                labels.append(theme)
labels = np.array(labels)
vectorizer = CountVectorizer(token_pattern=r"[a-z]{3,}", stop_words="english", min_df=12)
X = vectorizer.fit_transform(texts)
some = np.asarray(X.sum(axis=1)).ravel() >= 5
X, labels = X[some], labels[some]
words = vectorizer.get_feature_names_out()
print(f"{X.shape[0]} documents x {X.shape[1]} words, {X.nnz / np.prod(X.shape):.1%} non-zero")
print({theme: int(np.sum(labels == theme)) for theme in themes})

# %%
# "Capture" is the length of a document here. Nothing else has to change: ``"auto"``, the default,
# makes no assumption on how long documents should be.
train, test = train_test_split(np.arange(X.shape[0]), random_state=0, stratify=labels)
independent = NBVCPEstimator(random_state=0).fit(X[train])
settings = {
    "negative binomial": {},
    "Poisson": {"observation": "poisson"},
}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    models = {
        name: NBLNEstimator(
            latent_dim=8,
            informative_prior_estimator=independent,
            loadings_prior="ard",
            tol=1e-4,  # of the log-posterior: 0.006 nats per document
            random_state=0,
            **options,
        ).fit(X[train])
        for name, options in settings.items()
    }
# Words like "directory" and "header" occur in few documents, but often there: only an absurdly
# wide log-normal distribution has such counts, and the fit warns of it. Components and scores can
# be read; do not draw counts of these words from the model.
print(*(f"{w.category.__name__}: {w.message}" for w in said), sep="\n")
print("held-out log-likelihood per document (nats)")
print(f"  {'independent words':<20s}{independent.score(X[test]):8.2f}")
for name, model in models.items():
    rank = model.w_prior_diagnostics_["effective_rank"]
    print(f"  {name:<20s}{model.score(X[test]):8.2f}   effective rank {rank}")

# %%
# The picture shows how many factors the scores of the counts have, which of them are above the noise after
# a few sweeps, and the norms of the components of the fit. Those that are zero lie below the axis.
model = models["negative binomial"]
LoadingsSpectrumDisplay.from_estimator(model)
plt.show()

# %%
# Each component is an axis of words: it raises some words and lowers others.
for k in range(min(4, model.w_prior_diagnostics_["effective_rank"])):
    order = np.argsort(model.components_[k])
    print(f"component {k + 1}")
    print("  +", ", ".join(words[order[:-9:-1]]))
    print("  -", ", ".join(words[order[:8]]))

# %%
# The picture shows the held-out documents on two components. The model has not seen the themes.
# It separates most of them, but places "numbers", which has few words, in the middle: other
# components describe that theme. The Poisson channel scores about as well: with only a few words
# per document, bursts are rare, and the variances d can absorb them.
EmbeddingDisplay.from_estimator(model, X[test], groups=labels[test])
plt.show()
