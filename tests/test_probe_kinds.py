"""Nearest neighbors against scikit-learn, and attention-pooled probes, in this process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from test_model import random_parameters

from igpt_jax.config import MeshConfig, ModelConfig, UserError, parse
from igpt_jax.data.token_file import Tokens
from igpt_jax.evaluation import attention_probe, knn_probe, linear_probe
from igpt_jax.model import features, objectives
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import sharding

NO_TABLE = np.empty(0)


def test_neighbors_are_those_of_scikit_learn(monkeypatch):
    """The same classes for each k, in several blocks of queries, the last of which is shorter.

    Seen to fail without the features' lengths divided out, with equal votes, and with the temperature doubled.
    """
    monkeypatch.setattr(knn_probe, "AT_ONCE", 7 * 300)
    random = np.random.default_rng(0)
    centers_KD = random.normal(size=(5, 8))
    labels, asked = random.integers(0, 5, 300), random.integers(0, 5, 60)
    train_ED, queries_QD = (random.uniform(0.2, 5, (len(each), 1)) * random.normal(centers_KD[each])
                            for each in (labels, asked))
    counts = (1, 10, 20, 100, 300)
    found = knn_probe.predict(train_ED.astype(np.float32), labels, queries_QD.astype(np.float32), 5, counts)
    for count, classes in zip(counts, found, strict=True):
        theirs = KNeighborsClassifier(count, metric="cosine", algorithm="brute",
                                      weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(train_ED, labels)
        np.testing.assert_array_equal(classes, theirs.predict(queries_QD))


def test_few_examples_vote_all():
    assert knn_probe.neighbors_for(150) == (10, 20, 100) and knn_probe.neighbors_for(7) == (7,)


@pytest.mark.parametrize("kind", features.KINDS)
@pytest.mark.parametrize("objective", [objectives.Autoregressive(), objectives.Masked()])
def test_the_mean_of_the_tokens_features_is_the_pooled_feature(kind, objective):
    """At every layer. Seen to fail with one block more, and with the gain of the block before."""
    model = Model(ModelConfig("igpt_tiny", layers=3, embed=24, heads=2), 13, 5, "float32", objective=objective)
    params, tokens_BT = random_parameters(model), np.random.default_rng(0).integers(0, 13, (4, 25))
    hidden_BT = None if objective.causal else tokens_BT == 3
    expected = jax.jit(features.pooled, static_argnums=(0, 3))(model, params, tokens_BT, kind, hidden_BT)
    of_tokens = jax.jit(features.of_tokens, static_argnums=(0, 3, 4))
    for layer in range(4):
        found_BTD = of_tokens(model, params, tokens_BT, layer, kind, hidden_BT)
        assert found_BTD.shape == (4, 25, 24)
        np.testing.assert_allclose(found_BTD.mean(1), expected[layer], atol=1e-5)


def test_the_probe_is_attention_by_one_query_of_several_heads():
    """Against AIM's form in NumPy: a query, keys and values of each token, softmax by head, a linear classifier.

    Seen to fail with the gain before the scores, and with the heads' scores exchanged.
    """
    B, T, D, N, H, K = 3, 7, 12, 3, 4, 5
    random = np.random.default_rng(0)
    standards = attention_probe.Standards(random.normal(size=D), random.uniform(1, 2, D), random.uniform(1, 9, D))
    x, query, keys, values = (random.normal(size=shape) for shape in ((B, T, D), (N, H), (D, N, H), (D, N, H)))
    weights, bias = random.normal(size=(N, H, K)), random.normal(size=K)
    k_BTNH, v_BTNH = (np.einsum("btd,dnh->btnh", *each) for each in ((x, keys), (x * standards.gain_D, values)))
    scores = np.einsum("nh,btnh->bnt", query, k_BTNH) / D ** 0.5
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bnt,btnh->bnh", shares, v_BTNH).reshape(B, -1) @ weights.reshape(-1, K) + bias
    query_DN = np.einsum("nh,dnh->dn", query, keys)
    probe = {"query_DN": query_DN, "value_DNH": values, "class_NHK": weights, "bias_K": bias}
    found = attention_probe.logits(jax.tree.map(jnp.asarray, probe), standards,
                                   jnp.asarray(x * standards.deviation_D + standards.mean_D))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def marked(count, seed):
    """Images of 4x4 pixels with one marked pixel, and whether its row is odd. All have the same mean."""
    at = np.random.default_rng(seed).integers(0, 15, count)  # a causal model does not see the last pixel
    return Tokens(np.eye(16, dtype=np.int32)[at]), at // 4 % 2


def frozen(objective=None, batch_size=64):
    model = Model(ModelConfig("igpt_tiny", layers=2, embed=32, heads=2), 2, 4, "float32", objective=objective)
    return attention_probe.Frozen(model, random_parameters(model), sharding.make_mesh(MeshConfig()), 0, "residual",
                                  batch_size, NO_TABLE, 0)


def test_attention_finds_which_token_is_marked(monkeypatch):
    """All test images are classified correctly; a linear probe of the mean is near chance. The model does not change.

    Seen to fail with uniform attention, and with the labels of a batch in another order.
    """
    monkeypatch.setattr(attention_probe, "BATCH", 64)
    model, (train, labels), (test, expected) = frozen(), marked(600, 0), marked(200, 1)
    before = jax.tree.map(np.array, model.params)
    probes = attention_probe.fit(model, train, labels, 2, (1e-9, 1e-2), 150)
    found_ER = probes.predict(model, test)[:, 0]
    assert (found_ER[:, 1] == expected).mean() == 1 and (found_ER[:, 0] == expected).mean() < 0.8
    np.testing.assert_array_equal(probes[1].predict(model, test)[:, 0, 0], found_ER[:, 1])
    jax.tree.map(np.testing.assert_array_equal, before, model.params)

    means = [model.over_split(lambda x_BTD, _: x_BTD.mean(1), None, each)[:, 0] for each in (train, test)]
    linear, = linear_probe.fit(means[0], labels, 2, (1e-2,))
    assert linear.accuracy(means[1], expected) < 0.8


def test_views_of_a_masked_model():
    """The classes under five masks differ, and do not depend on the batch size.

    Seen to fail with views that depend on the position in the batch.
    """
    train, labels = marked(70, 0)
    found = []
    for batch_size in (64, 8):
        model = frozen(objectives.Masked(0.3), batch_size)
        found.append(attention_probe.fit(model, train, labels, 2, (1e-2,), 30).predict(model, train, views=5))
    assert found[0].shape == (70, 5, 1) and (found[0] != found[0][:, :1]).any()
    assert (found[0] == found[1]).mean() > 0.99


@pytest.mark.slow
def test_meshes_and_batch_sizes_agree(python):
    """See the script: the weights of a probe in float64 to 1e-8. Seen to fail with the padding of a batch counted."""
    python("attention_probe_meshes.py")


@pytest.mark.parametrize(("given", "message"), [
    ({"kind": "knm"}, "kind='knm' is not known. Did you mean 'knn'?"),
    ({"kind": "attention", "attention_rates": (0.0,)}, "must be positive"),
    ({"attention_rates": (1e-2,)}, "has no effect on kind=linear. Set kind=attention."),
])
def test_bad_keys_are_refused(given, message):
    with pytest.raises(UserError) as caught:
        parse("probe", given)
    assert message in str(caught.value)
