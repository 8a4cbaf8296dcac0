"""An own client of xenstored, the small database in which Xen's tools and guests find each other."""

from __future__ import annotations

from understudy_xen.xenstore.asking import Access as Access
from understudy_xen.xenstore.asking import Permission as Permission
from understudy_xen.xenstore.blocking import BlockingStore as BlockingStore
from understudy_xen.xenstore.client import Transaction as Transaction
from understudy_xen.xenstore.client import XenStore as XenStore
from understudy_xen.xenstore.errors import XenStoreConflict as XenStoreConflict
from understudy_xen.xenstore.errors import XenStoreError as XenStoreError
from understudy_xen.xenstore.errors import XenStoreGarbage as XenStoreGarbage
from understudy_xen.xenstore.errors import XenStoreLimit as XenStoreLimit
from understudy_xen.xenstore.errors import XenStoreLost as XenStoreLost
from understudy_xen.xenstore.errors import XenStoreMissing as XenStoreMissing
from understudy_xen.xenstore.errors import XenStoreRefused as XenStoreRefused
from understudy_xen.xenstore.errors import XenStoreSilent as XenStoreSilent
from understudy_xen.xenstore.watching import Watch as Watch
