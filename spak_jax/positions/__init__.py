"""Where tokens are, as the models know it: position schemes, one class each.

Attention learns of positions in two ways: RoPE rotates queries and keys by an integer each, and a
learned bias is looked up by the difference of two tokens' ids, beyond which a window may end.

| scheme | rotates by | bias and window over |
| --- | --- | --- |
| rope | the token's place in the row | |
| random-rope | places with random gaps between them | |
| none | | |
| token-bias | | the token's place in the row |
| coupled-rope | position ids of the task | |
| coupled-embedding | | ; a learned embedding of the task's position ids is added to the tokens |
| coupled-bias | | position ids of the task |
| grid-bias | | position ids of the task that are those of a grid: steps between two cells |
| learned | | position ids that the model learns itself (`learned.LearnedCounter`) |

The position ids of a task come from what knows the task: they say which digits belong together. All
other schemes know of tokens and their order only. A scheme of your own is one more class
(`base.PositionScheme`), registered under a name: `examples/absolute_positions.py`.
"""
