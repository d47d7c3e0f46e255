// A header of the project: its text is part of what the cache is keyed by.
__device__ inline float doubled(float value) { return 2.0f * value; }
