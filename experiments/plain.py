"""The plain way, to compare with: one step as a trainer does it that calls transformers, and a training run of such steps.

    python -m experiments.plain --algo grpo ...      train.py, with PlainPolicy and generate_plainly in the places of Policy and generate

That is transformers' own attention (SDPA) and cache, G copies of the prompt, and the video encoded again for every row of every
pass. bench.py times its phases. A run of it is the same run, with the same dice, up to rounding (`claims.py shared_prefix`).
"""

from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence

import eval
import rollout
import step
import train
from bench import Plain
from model import Policy


class PlainPolicy(Policy):
    """The policy as transformers has it: its attention, and for every response a row of its own with the video encoded again."""

    def __init__(self, net, folder):
        super().__init__(net, folder)
        net.set_attn_implementation("sdpa")

    def encode(self, prompts):
        """Nothing is encoded ahead."""
        return [torch.zeros(0, self.config.text_config.hidden_size) for _ in prompts]

    def _score(self, prompts, responses, visual_embeds, temperature):
        out = []
        for prompt, group in zip(prompts, responses):
            plain = Plain(self, prompt, [*pad_sequence(group, batch_first=True)])
            logp = (plain.distribution() / temperature).log_softmax(-1)  # (G, R, vocabulary)
            entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
            chosen = logp.gather(-1, plain.responses[..., None])[..., 0]
            out += [(x[: len(r)], h[: len(r)]) for x, h, r in zip(chosen, entropy, group)]
        return tuple(torch.cat(column) for column in zip(*out))


@torch.no_grad()
def generate_plainly(
    policy, prompts, G, *, max_new, temperature=1.0, top_p=1.0, seeds, visual_embeds=None
):
    """rollout.generate in transformers' forward and cache, with the same dice: G copies of a prompt, prompt after prompt."""
    groups, training = [], policy.training
    policy.eval()
    eos = torch.tensor(policy.eos_ids)
    for prompt, seed in zip(prompts, seeds):
        plain = Plain(policy, prompt, [torch.zeros(max_new, dtype=torch.long)] * G)
        uniform = torch.rand(
            G, max_new, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        P, ids, medium, cache, drawn = (
            len(prompt.ids),
            plain.ids.expand(G, -1),
            plain.copies,
            None,
            [],
        )
        done, start = torch.zeros(G, dtype=torch.bool), 0
        while len(drawn) < max_new and not done.all():
            where = plain.positions[..., start : start + ids.shape[1]]
            out = policy.net(
                ids,
                **medium,
                position_ids=where,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                mm_token_type_ids=plain.kinds(ids),
            )
            logits = out.logits[:, -1].float().index_fill(-1, policy.banned, -1e30)
            token, *figures = rollout.sample(logits, uniform[:, len(drawn)], temperature, top_p)
            drawn.append((torch.where(done, -1, token), *figures))
            done = done | torch.isin(token, eos)
            start, ids, medium, cache = P + len(drawn) - 1, token[:, None], {}, out.past_key_values
        tokens, logps, entropies = (torch.stack(column, 1) for column in zip(*drawn))
        lengths = (tokens >= 0).sum(1).tolist()
        responses, logps, entropies = (
            [x[:n] for x, n in zip(rows, lengths)] for rows in (tokens, logps, entropies)
        )
        truncated = [int(response[-1]) not in policy.eos_ids for response in responses]
        groups.append(rollout.Group(prompt, responses, logps, truncated, entropies))
    policy.train(training)
    return groups


def main(argv=None):
    """The command line of train.py."""
    with (
        patch.object(train, "Policy", PlainPolicy),
        patch.object(step, "generate", generate_plainly),
        patch.object(eval, "generate", generate_plainly),
    ):
        train.main(argv)


if __name__ == "__main__":
    main()
