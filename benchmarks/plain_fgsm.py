"""FGSM as a user of transformers writes it: what the default attack has to beat.

Each request is attacked alone: one step along the sign of the gradient of its negative
log-likelihood, with respect to its embeddings. Requests go in batches of eight, sorted by length,
so that next to nothing is padding.
"""

import torch


def answers(model, requests, epsilon, batch_size=8, step=None):
    """(log-likelihood, is_greedy) of the continuation of each request under attack.

    Args:
        model: a causal LM of transformers.
        requests: (tokens, number of the last of them that are the continuation) of each.
        epsilon: absolute amplitude.
        batch_size: requests of a batch.
        step: attacked embeddings of clean ones, of what they predict, and of what of it is no
            padding; None: the step that is written here.
    """
    found = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = [torch.tensor(requests[i][0]) for i in part]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        length = torch.tensor([len(row) for row in rows])
        inputs, target = tokens[:, :-1], tokens[:, 1:]
        real = torch.arange(target.shape[1]) < length[:, None] - 1
        continuation = torch.tensor([requests[i][1] for i in part])
        scored = real & (torch.arange(target.shape[1]) >= (length - 1 - continuation)[:, None])
        x = model.get_input_embeddings()(inputs).detach()
        if step is None:
            x.requires_grad_(True)
            log_prob = model(inputs_embeds=x).logits.log_softmax(-1)
            loss = -(log_prob.gather(-1, target[..., None])[..., 0] * real).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            del log_prob, loss
            attacked = x.detach() + epsilon * gradient.sign() * real[..., None]
        else:
            attacked = step(x, target, real)
        with torch.no_grad():
            log_prob = model(inputs_embeds=attacked).logits.log_softmax(-1)
        values = (log_prob.gather(-1, target[..., None])[..., 0] * scored).sum(-1)
        greedy = ((log_prob.argmax(-1) == target) | ~scored).all(-1)
        for i, value, is_greedy in zip(part, values.tolist(), greedy.tolist(), strict=True):
            found[i] = value, is_greedy
    return found
