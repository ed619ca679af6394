"""The page that `refimpl serve` shows at /, as files, and in one file with a recorded run. May import nothing of the package."""
