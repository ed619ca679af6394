"""The parts of a Hugging Face directory that see and hear, under the names of projector files (mmproj). A room of loading: same imports."""
