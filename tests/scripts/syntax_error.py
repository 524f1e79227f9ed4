import torch
print "python 2"  # expect: unreadable
