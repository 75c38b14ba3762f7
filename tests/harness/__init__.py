"""What the tests that drive a whole runtime share.

isolate    runs a test in network, mount and IPC namespaces of its own
runtimes   starts berth, or another runtime to compare it with, in a directory of its own
leaks      asserts that nothing is left behind of what was not there before
obstacles  says what stands in the way before a test starts
oci        which OCI runtimes there are, and what each can do
report     prints steps and their outcome
keeper     removes what a failed step has made
options    the command line every such test understands
"""
