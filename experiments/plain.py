"""The plain way, to compare with: a training run in which transformers does the work.

    python -m experiments.plain --algo grpo ...      train.py, with PlainPolicy as its policy

It uses transformers' own attention (SDPA) and cache, G copies of the prompt, and encodes the video
again for every row of every pass. bench.py times its phases. With the same flags and seed it is
the same run up to rounding (python -m experiments.claims shared_prefix).
"""

import torch
from torch.nn.utils.rnn import pad_sequence

import rollout
import train
from model import Policy
from ways import Plain


class PlainPolicy(Policy):
    """The policy as transformers runs it: a row of its own for every response, the video encoded
    again in each."""

    def __init__(self, net, folder):
        super().__init__(net, folder)
        net.set_attn_implementation("sdpa")

    def encode(self, prompts):
        """Encodes nothing: every pass encodes for itself."""
        return [torch.zeros(0, self.config.text_config.hidden_size) for _ in prompts]

    def _score(self, prompts, responses, visual_embeds, temperature):
        logps, entropies = [], []
        for prompt, group in zip(prompts, responses):
            plain = Plain(self, prompt, list(pad_sequence(group, batch_first=True)))
            logp = (plain.distribution() / temperature).log_softmax(-1)  # (G, R, vocabulary)
            chosen = logp.gather(-1, plain.responses[..., None])[..., 0]  # (G, R)
            logp = logp.detach()
            entropy = -(logp.exp() * logp).sum(-1)  # (G, R)
            for i, response in enumerate(group):
                logps.append(chosen[i, : len(response)])
                entropies.append(entropy[i, : len(response)])
        return torch.cat(logps), torch.cat(entropies)


@rollout.decode.register
def decode_plainly(
    policy: PlainPolicy, prompts, visual_embeds, seeds, G, max_new, temperature, top_p
):
    """rollout.decode with transformers' forward and cache, one prompt after the other, from the
    same seeds."""
    groups = []
    for prompt, seed in zip(prompts, seeds):
        groups.append(decode_group(policy, prompt, seed, G, max_new, temperature, top_p))
    tokens, logps, entropies = zip(*groups)
    return torch.stack(tokens), torch.stack(logps), torch.stack(entropies)  # (B, G, max_new)


def decode_group(policy, prompt, seed, G, max_new, temperature, top_p):
    """G responses to one prompt, from G copies of it -> tokens, log-probs, entropies, each (G,
    max_new)."""
    plain = Plain(policy, prompt, [torch.zeros(max_new, dtype=torch.long)] * G)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(G, max_new, dtype=torch.float64, generator=generator)
    tokens = torch.full((G, max_new), -1)
    logps, entropies = torch.zeros(2, G, max_new)
    eos, done = torch.tensor(policy.eos_ids), torch.zeros(G, dtype=torch.bool)
    ids, pixels, cache, start = plain.ids.expand(G, -1), plain.copies, None, 0  # first the prompt
    for t in range(max_new):
        end = start + ids.shape[1]
        out = policy.net(
            ids,
            **pixels,
            position_ids=plain.positions[..., start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            mm_token_type_ids=plain.kinds(ids),
        )
        logits = out.logits[:, -1].float().index_fill(-1, policy.banned, -1e30)
        token, logp, entropy = rollout.sample(logits, uniform[:, t], temperature, top_p)
        tokens[:, t] = torch.where(done, -1, token)
        logps[:, t] = torch.where(done, 0.0, logp)
        entropies[:, t] = torch.where(done, 0.0, entropy)
        done |= torch.isin(token, eos)
        if done.all():
            break
        ids, pixels, cache, start = token[:, None], {}, out.past_key_values, end
    return tokens, logps, entropies


def main(argv=None):
    """The command line of train.py."""
    train.main(argv, policy_class=PlainPolicy)


if __name__ == "__main__":
    main()
