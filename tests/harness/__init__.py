"""What the tests that drive a whole runtime share.

isolate    runs a test in network, mount and IPC namespaces of its own
runtimes   starts berth, or another runtime to compare it with, in a directory of its own
leaks      asserts that nothing is left behind
report     prints steps and their outcome
options    the command line every such test understands
"""
