"""A Hub on 127.0.0.1 for the real huggingface_hub client: repositories in memory, and a script of faults.

It speaks what publishing and loading need: create, refs, branch, tag, validate-yaml, preupload, LFS batch, upload and
verify, commit with parent and pull request, info, tree, and resolve with ETag and ranges. A commit is one
assignment under a lock: half of one cannot be seen. Writes, and private repositories, need the token.
"""
