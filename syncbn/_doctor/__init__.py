"""What ``syncbn doctor`` does: say what is here, and try whether ranks on this host train exactly.

The trials are jobs of real processes, started as the launcher starts them. Whatever they do, they end with the
deadline: each is a session of its own that is ended from here, and a rank ends itself at the deadline as well.

``examination`` has the order of it, ``looking`` what is found without trying, ``trial`` what a rank of a trial does,
``processes`` how they start and end, ``matrix`` the versions that were tested, ``report`` the lines.
"""
