"""What a file has to look like that another engine writes: as text for people, and its keys. foreign.py reads it, check.py explains what
is wrong with one.
"""

NUMBERS = ("sampled", "temperature", "seed")
WORDS = ("prompt", "template", "model_sha256")
OPTIONAL = (*WORDS, *NUMBERS)
PLACEHOLDERS = "258880 for an image, 258881 for a sound"

TEXT = f"""\
A file of another engine: .npz (numpy.savez), or .safetensors with words and single numbers in
its metadata. refimpl trace --npz FILE.npz writes one to look at; refimpl compare --check FILE
says what is wrong with one; refimpl compare --exporter pytorch, cpp or mlx prints code that
writes one.

  ids            int (T,): the token ids of the prompt
  arithmetic     how the engine rounds: float32, bfloat16, float16, q8 (8-bit activations) or
                 exact (as float32)
  NAME-LAYER     float (R, ...): a value of a layer, a row for each position, by the name that
  NAME           refimpl trace --names lists: l_out-0, Qcur-3, result_output. Axes after the
                 first may be flattened; an axis of 1 in front, a batch, is dropped; bfloat16 is
                 saved as float32. Any may be missing; other names are listed, not compared.
  positions      optional, int (R,), rising: which positions the rows are. Default: all T.

Optional, and compared before the tensors, in this order: the first that differs is the answer.

  model_sha256   SHA-256 of the model's file, in hexadecimal (refimpl trace writes it)
  prompt         the text
  template       what the chat template made of it (refimpl trace --chat)
  sampled        int: the id taken after the prompt; with temperature, a number, and seed. Judged
                 after all tensors, where temperature is 0.

Pictures and sounds: values of a tower are image0.NAME-LAYER, audio0.NAME-LAYER, (rows, ...), of
patches row by row, frames without padding, or soft tokens. In the places of soft tokens ids has
the placeholder ({PLACEHOLDERS}) or any negative number.
Write image0.patches as (row, column, colour) in 0 to 1, whatever the engine's own order is.
"""
