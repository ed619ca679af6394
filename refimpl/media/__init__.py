"""Pictures and sounds become numbers: opened, bounded, scaled, cut into patches or mel frames. May import host, extras and formats.

Letters of array shapes in this room:

    H, W height and width in pixels    C the colours red, green, blue    T patches of a picture     Z numbers in a patch, side * side * 3
    N samples of a sound               F frames of a sound               M mel filters, 128         B frequencies of a spectrum, 257

What each model gets of them:

                     E2B, E4B                        12B                                     26B-A4B, 31B
    a picture        patches of 16, T = 9 x tokens   patches of 48, T = tokens               as E2B
    a second of it   100 mel frames, 25 tokens       25 frames of 640 samples, 25 tokens     no sound
"""
