// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * One record for each exec, fork and exit, complete at the moment that it happens.
 *
 * Tracepoints of the scheduler only: they are in every kernel, where kprobes and fentry may be configured out. What each
 * record holds, and how it is laid out, is in docs/ebpf.md and procwatch/wire/bpf_event.py; the three must agree.
 *
 * They are "tp_btf" and not "raw_tp": the arguments have types, so a field is a load that the verifier has checked, where
 * a call of bpf_probe_read_kernel() takes ten times as long. What was in map memory or comes from a cast has lost its
 * type, and is read with BPF_CORE_READ.
 *
 * State of the loops lives in map memory and not on the stack: verifiers before 6.8 look at the body of a bpf_loop()
 * once only and would believe what they saw there.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* A TASK is counted only: a thread, or a thread of the kernel. */
enum kind { EXEC = 1, FORK = 2, EXIT = 3, ARGV = 4, EXEC_FAILED = 5, TASK = 6, KINDS = 8 };

/* Of what many processes share. */
enum shared_flag {
	EXE_CUT = 1 << 0, /* longer than STRING bytes or STEPS components */
	EXE_DETACHED = 1 << 1, /* on a file system of the kernel's own, which nobody can mount: memfd */
	EXE_DELETED = 1 << 2,
	CWD_CUT = 1 << 3,
	CGROUP_CUT = 1 << 4,
	FILE_CUT = 1 << 5,
	SCRIPT = 1 << 6, /* an interpreter runs the file that was given */
	SETUID = 1 << 7,
	SETGID = 1 << 8,
	CAPABILITIES = 1 << 9,
};

/* Of the one record. */
enum flag {
	ARGV_CUT = 1 << 0, /* at the limit of the settings */
	ARGV_FAULT = 1 << 1, /* a page of the arguments was not in memory */
	FIRST = 1 << 2, /* no exec since the fork */
	NO_MM = 1 << 3, /* exit: the memory was given back before the tracepoint (kernels before 6.16) */
};

#define NAME 256 /* NAME_MAX and its NUL */
#define STRING 4096 /* PATH_MAX */
#define SHORT 8 /* components of a path that needs no loop */
#define STEPS 512 /* components and mounts of one path */
#define PART 8192 /* arguments in one record; longer ones send ARGV records ahead */
#define STRINGS (4 * (STRING + NAME))

/* Written once by the loader, before the programs are verified: the verifier folds them. */
struct settings {
	u32 argv_limit; /* bytes */
	u32 mute_pid; /* 0: none */
	u32 ns_per_tick;
	u32 nr_execve, nr_execveat; /* system call numbers, and where pt_regs of this machine has what */
	u32 nr_offset, arg0_offset, arg1_offset;
	u32 every_fork; /* 0: only those that something else depends on */
};
const volatile struct settings settings = {};

struct head {
	u32 kind;
	u32 pid;
	u64 time; /* CLOCK_BOOTTIME ns */
	u64 start; /* of the process, CLOCK_BOOTTIME ns; fork: ticks, as /proc has it */
	u32 ppid;
	u32 extra; /* exec, exit: flags; fork, argv, exec_failed: bytes that follow */
};

/*
 * What most processes have in common with others stands together, so that the reader finds all of it under one key:
 * everything from `inode` to the last of the strings.
 */
struct exec_record {
	struct head head;
	u64 maxrss; /* pages: what the process had before */
	u32 ns_pid;
	u32 argv_len, argv_before; /* bytes here, bytes in ARGV records before */
	u32 shared_len; /* bytes from here to the arguments */
	u64 inode, size, dev;
	u32 uid, gid, euid, egid, auid, session, tty, flags;
	u32 ns[8]; /* pid mnt user net uts ipc cgroup time */
	char comm[16];
	u16 exe_len, cwd_len, cgroup_len, file_len;
};

struct exit_record {
	struct head head;
	u64 utime, stime, runtime; /* ns */
	u64 rss, maxrss; /* pages */
	u32 status, pad;
	char comm[16];
};

struct failed_record {
	struct head head;
	u32 error, pad;
	char file[STRING];
};

/* A path is sent leaf first, each component with its NUL: user space turns it round, and only when it is new. */
struct strings {
	u32 off; /* end of what is in buf */
	u32 limit; /* where the string being appended is too long: PATH_MAX bytes from its begin */
	u32 done;
	u32 detached;
	struct dentry *dentry, *root; /* where the walk is, and the root of the mount that it is in */
	struct mount *mnt;
	struct kernfs_node *kn;
};

struct exec_scratch {
	struct strings str;
	u64 argv; /* user address of what is still to be read */
	u32 argv_left, argv_sent, argv_fault, pad;
	struct exec_record rec;
	char buf[STRINGS + PART];
};

struct part_scratch {
	struct head head;
	char buf[PART];
};

struct fork_scratch {
	struct strings str;
	struct head head;
	char buf[STRINGS]; /* only STRING + NAME are used: one size lets one function fill both */
};

struct cpu_times {
	struct list_head *next;
	struct list_head *end;
	u64 utime, stime, runtime;
};

struct children {
	struct list_head *next;
	struct list_head *end;
};

struct cgroup_search {
	struct list_head *next;
	struct list_head *end;
	struct cgroup *best;
	u32 rank;
};

struct counters {
	u64 seen[KINDS];
	u64 lost[KINDS];
};

#define MAP(NAME_, TYPE, ENTRIES, VALUE, FLAGS)                                                                        \
	struct {                                                                                                       \
		__uint(type, TYPE);                                                                                    \
		__uint(max_entries, ENTRIES);                                                                          \
		__uint(map_flags, FLAGS);                                                                              \
		__type(key, u32);                                                                                      \
		__type(value, VALUE);                                                                                  \
	} NAME_ SEC(".maps")

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 << 20); /* the loader sets another */
} ring SEC(".maps");

MAP(counters, BPF_MAP_TYPE_ARRAY, 1, struct counters, BPF_F_MMAPABLE);
/* Each program has scratch of its own: the kernel does not let a program nest in itself on one CPU. */
MAP(exec_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, struct exec_scratch, 0);
MAP(part_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, struct part_scratch, 0);
MAP(fork_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, struct fork_scratch, 0);
MAP(failed_scratch, BPF_MAP_TYPE_PERCPU_ARRAY, 1, struct failed_record, 0);
MAP(times, BPF_MAP_TYPE_PERCPU_ARRAY, 1, struct cpu_times, 0);
/* Exec and fork look for cgroups: an entry for each. */
MAP(search, BPF_MAP_TYPE_PERCPU_ARRAY, 2, struct cgroup_search, 0);

/* Exec and exit look at children: an entry for each. */
MAP(children, BPF_MAP_TYPE_PERCPU_ARRAY, 2, struct children, 0);

struct ended_key {
	u64 start;
	u64 pid;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct ended_key);
	__type(value, u32);
} ended SEC(".maps");

static __always_inline void *entry(void *map, u32 key)
{
	return bpf_map_lookup_elem(map, &key);
}

static __always_inline void count_seen(enum kind kind)
{
	struct counters *c = entry(&counters, 0);

	if (c)
		__sync_fetch_and_add(&c->seen[kind], 1);
}

static __always_inline void count_lost(enum kind kind)
{
	struct counters *c = entry(&counters, 0);

	if (c)
		__sync_fetch_and_add(&c->lost[kind], 1);
}

static __always_inline void emit(enum kind kind, void *record, u64 size)
{
	count_seen(kind);
	if (bpf_ringbuf_output(&ring, record, size, 0))
		count_lost(kind);
}

static __always_inline void fill_head(struct head *head, enum kind kind, struct task_struct *task)
{
	head->kind = kind;
	head->time = bpf_ktime_get_boot_ns();
	head->pid = task->tgid;
	head->start = task->group_leader->start_boottime;
	head->ppid = task->real_parent->tgid;
	head->extra = 0;
}

/*
 * Where nobody wants forks, most of them need not be told: the exec says who the parent is, and the end of a process
 * that never executed anything is that of a copy of its parent. But such a copy has to be known before it forks itself,
 * and before its parent ends or becomes another program. These records are not births, so they are not counted as seen.
 */
static __always_inline void announce(struct task_struct *task)
{
	u64 start = BPF_CORE_READ(task, group_leader, start_boottime);
	struct head head = {
		.kind = FORK,
		.time = start,
		.pid = BPF_CORE_READ(task, tgid),
		.start = start / settings.ns_per_tick,
		.ppid = BPF_CORE_READ(task, real_parent, tgid),
	};

	if (bpf_ringbuf_output(&ring, &head, sizeof(head), 0))
		count_lost(FORK);
}

static long child_step(u32 i, struct children **ctx)
{
	struct children *c = *ctx;
	struct task_struct *child;

	if (!c->next || c->next == c->end)
		return 1;
	child = (void *)c->next - bpf_core_field_offset(struct task_struct, sibling);
	c->next = BPF_CORE_READ(child, sibling.next);
	/* Whose last thread has ended was told. */
	if (BPF_CORE_READ(child, flags) & PF_FORKNOEXEC && BPF_CORE_READ(child, signal, live.counter) > 0)
		announce(child);
	return 0;
}

static __always_inline void announce_children(struct task_struct *task, u32 slot)
{
	struct list_head *end = (void *)task + bpf_core_field_offset(struct task_struct, children);
	struct list_head *next = task->children.next;
	struct children *c;

	if (settings.every_fork || next == end)
		return;
	c = entry(&children, slot);
	if (!c)
		return;
	c->next = next;
	c->end = end;
	bpf_loop(1 << 20, child_step, &c, 0);
}

/* Append one component; false when there is no room for it. */
static __always_inline bool append(struct strings *str, char *buf, const char *name)
{
	u32 off = str->off;
	long n;

	if (off > STRINGS - NAME || off >= str->limit)
		return false;
	n = bpf_probe_read_kernel_str(buf + off, NAME, name);
	if (n <= 0)
		return false;
	str->off = off + n;
	return true;
}

static __always_inline void begin(struct strings *str)
{
	str->limit = str->off + STRING;
	str->done = 0;
	str->detached = 0;
}

/* Whether all of it was appended, and the kernel itself would tell it: PATH_MAX bytes with a NUL, fs/d_path.c. */
static __always_inline bool whole(struct strings *str)
{
	return str->done && str->off < str->limit;
}

static long path_step(u32 i, struct exec_scratch **ctx)
{
	struct exec_scratch *s = *ctx;
	struct strings *str = &s->str;
	struct dentry *dentry = str->dentry, *parent;
	struct mount *mnt = str->mnt, *above;

	if (dentry == str->root) {
		above = BPF_CORE_READ(mnt, mnt_parent);
		if (above == mnt) {
			str->done = 1;
			return 1;
		}
		str->dentry = BPF_CORE_READ(mnt, mnt_mountpoint);
		str->mnt = above;
		str->root = BPF_CORE_READ(above, mnt.mnt_root);
		return 0;
	}
	if (!append(str, s->buf, BPF_CORE_READ(dentry, d_name.name)))
		return 1;
	parent = BPF_CORE_READ(dentry, d_parent);
	if (parent == dentry) {
		str->detached = 1;
		str->done = 1;
		return 1;
	}
	str->dentry = parent;
	return 0;
}

/*
 * Append a path; false when it was cut. Most are short and do not leave their mount: their dentries are walked here,
 * where each is a load, and the loop above, where each is a call of a helper, does the rest.
 */
static __always_inline bool append_path(struct exec_scratch *s, struct vfsmount *vfsmnt, struct dentry *dentry)
{
	struct dentry *root = vfsmnt->mnt_root, *parent;
	u32 i;

	s->str.mnt = (void *)vfsmnt - bpf_core_field_offset(struct mount, mnt);
	s->str.root = root;
	begin(&s->str);
	for (i = 0; i < SHORT && dentry != root; i++) {
		parent = dentry->d_parent;
		if (parent == dentry || !append(&s->str, s->buf, dentry->d_name.name))
			break;
		dentry = parent;
	}
	s->str.dentry = dentry;
	bpf_loop(STEPS, path_step, &s, 0);
	return whole(&s->str);
}

static __always_inline struct kernfs_node *kernfs_parent(struct kernfs_node *kn)
{
	if (bpf_core_field_exists(kn->__parent))
		return BPF_CORE_READ(kn, __parent);
	return BPF_CORE_READ((struct kernfs_node___old *)kn, parent);
}

struct cgroup_walk {
	struct strings *str;
	char *buf;
};

static long cgroup_step(u32 i, struct cgroup_walk *w)
{
	struct strings *str = w->str;
	struct kernfs_node *kn = str->kn, *parent = kernfs_parent(kn);

	if (!parent) {
		str->done = 1;
		return 1;
	}
	if (!append(str, w->buf, BPF_CORE_READ(kn, name)))
		return 1;
	str->kn = parent;
	return 0;
}

/* Smaller is better: the order in which a reader of /proc/PID/cgroup would look, docs/ebpf.md. */
#define RANK(MASK, SUBSYS, N)                                                                                          \
	if (bpf_core_enum_value_exists(enum cgroup_subsys_id, SUBSYS) &&                                               \
	    (MASK) >> bpf_core_enum_value(enum cgroup_subsys_id, SUBSYS) & 1)                                          \
	return N

static __always_inline u32 rank(struct cgroup_root *root)
{
	u32 mask = BPF_CORE_READ(root, subsys_mask);
	u64 name = 0;

	if (!mask) {
		bpf_core_read(&name, sizeof(name), &root->name);
		return name == 0x00646d6574737973 /* "systemd" and its NUL, little-endian */ ? 1 : 10;
	}
	RANK(mask, pids_cgrp_id, 2);
	RANK(mask, memory_cgrp_id, 3);
	RANK(mask, cpu_cgrp_id, 4);
	RANK(mask, cpuacct_cgrp_id, 5);
	RANK(mask, cpuset_cgrp_id, 6);
	RANK(mask, devices_cgrp_id, 7);
	RANK(mask, freezer_cgrp_id, 8);
	RANK(mask, io_cgrp_id, 9);
	return 10;
}

static long search_step(u32 i, struct cgroup_search **ctx)
{
	struct cgroup_search *s = *ctx;
	struct cgrp_cset_link *link;
	struct cgroup *cgroup;
	u32 r;

	if (!s->next || s->next == s->end)
		return 1;
	link = (void *)s->next - bpf_core_field_offset(struct cgrp_cset_link, cgrp_link);
	s->next = BPF_CORE_READ(link, cgrp_link.next);
	cgroup = BPF_CORE_READ(link, cgrp);
	if (BPF_CORE_READ(cgroup, level) <= 0)
		return 0;
	r = rank(BPF_CORE_READ(cgroup, root));
	if (r < s->rank) {
		s->rank = r;
		s->best = cgroup;
	}
	return 0;
}

/* The cgroup that says most: of v2, or where that is the root, of the first v1 hierarchy that is not at its root. */
static __always_inline struct cgroup *pick_cgroup(struct css_set *set, u32 slot)
{
	struct cgroup *cgroup = set->dfl_cgrp;
	struct cgroup_search *s;

	if (cgroup->level > 0)
		return cgroup;
	s = entry(&search, slot);
	if (!s)
		return cgroup;
	s->best = cgroup;
	s->rank = 100;
	s->next = set->cgrp_links.next;
	s->end = (void *)set + bpf_core_field_offset(struct css_set, cgrp_links);
	bpf_loop(64, search_step, &s, 0);
	return s->best;
}

/* Append the path of the task's cgroup; false when it was cut. */
static __always_inline bool append_cgroup(struct strings *str, char *buf, struct task_struct *task, u32 slot)
{
	struct cgroup_walk walk = { .str = str, .buf = buf };
	struct cgroup *cgroup = pick_cgroup(task->cgroups, slot);

	str->kn = BPF_CORE_READ(cgroup, kn);
	begin(str);
	bpf_loop(STEPS, cgroup_step, &walk, 0);
	return whole(str);
}

static __always_inline void fill_ids(struct exec_record *rec, struct task_struct *task, const struct cred *cred)
{
	struct signal_struct *signal = task->signal;
	struct tty_struct *tty = signal->tty;
	struct tty_driver *driver;
	u32 minor;

	rec->uid = cred->uid.val;
	rec->gid = cred->gid.val;
	rec->euid = cred->euid.val;
	rec->egid = cred->egid.val;
	rec->auid = -1;
	if (bpf_core_field_exists(task->loginuid))
		rec->auid = task->loginuid.val;
	rec->session = signal->pids[PIDTYPE_SID]->numbers[0].nr;
	rec->maxrss = signal->maxrss;
	rec->tty = 0;
	if (tty) {
		driver = tty->driver;
		minor = driver->minor_start + tty->index;
		rec->tty = (minor & 0xff) | driver->major << 8 | (minor & ~0xff) << 12; /* new_encode_dev() */
	}
	bpf_core_read(rec->comm, sizeof(rec->comm), &task->comm);
}

static __always_inline void fill_namespaces(struct exec_record *rec, struct task_struct *task, const struct cred *cred)
{
	struct nsproxy *ns = task->nsproxy;
	struct pid *pid = task->thread_pid;
	u64 level = pid->level, at;
	struct upid *own;

	if (!level) {
		rec->ns_pid = pid->numbers[0].nr;
		rec->ns[0] = pid->numbers[0].ns->ns.inum;
	} else {
		/* With an index it takes helpers; the level is 32 at most, and verifiers of 6.1 want to see a bound. */
		at = level * bpf_core_type_size(struct upid) & 0xfff;
		own = (void *)pid + bpf_core_field_offset(struct pid, numbers) + at;
		rec->ns_pid = BPF_CORE_READ(own, nr);
		rec->ns[0] = BPF_CORE_READ(own, ns, ns.inum);
	}
	rec->ns[1] = ns->mnt_ns->ns.inum;
	rec->ns[2] = cred->user_ns->ns.inum;
	rec->ns[3] = ns->net_ns->ns.inum;
	rec->ns[4] = ns->uts_ns->ns.inum;
	rec->ns[5] = ns->ipc_ns->ns.inum;
	rec->ns[6] = ns->cgroup_ns->ns.inum;
	rec->ns[7] = 0;
	if (bpf_core_field_exists(ns->time_ns))
		rec->ns[7] = ns->time_ns->ns.inum;
}

static __always_inline u32 fill_file(struct exec_record *rec, struct file *file)
{
	struct inode *inode = file->f_inode;
	u32 dev = inode->i_sb->s_dev, major = dev >> 20, minor = dev & 0xfffff;

	rec->inode = inode->i_ino;
	rec->size = inode->i_size;
	rec->dev = (major & 0xfff) << 8 | (u64)(major & ~0xfff) << 32 | (minor & 0xff) | (u64)(minor & ~0xff) << 12;
	/* d_unlinked(): /proc/PID/exe says " (deleted)" also when the file has another name left. */
	return !inode->i_nlink || !file->f_path.dentry->d_hash.pprev ? EXE_DELETED : 0;
}

/* What the file's mode or capabilities gave. per_clear is set when the kernel honoured any of them. */
static __always_inline u32 privileges(struct exec_record *rec, struct linux_binprm *bprm, const struct cred *cred)
{
	u32 mode = bprm->file->f_inode->i_mode, flags = 0, root = 0;
	struct user_namespace *user_ns = cred->user_ns;
	u64 permitted, ambient;

	if (bprm->per_clear) {
		if (mode & S_ISUID && rec->euid != rec->uid)
			flags |= SETUID;
		if ((mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP) && rec->egid != rec->gid)
			flags |= SETGID;
	}
	/* Root, also that of a user namespace, has capabilities from its uid and not from the file. */
	root = user_ns->uid_map.extent[0].first ? -1 : user_ns->uid_map.extent[0].lower_first;
	if (rec->uid == root || rec->euid == root)
		return flags;
	bpf_core_read(&permitted, sizeof(permitted), &cred->cap_permitted);
	bpf_core_read(&ambient, sizeof(ambient), &cred->cap_ambient);
	return permitted & ~ambient ? flags | CAPABILITIES : flags;
}

/* Arguments that do not fit into the exec's record go ahead of it, PART bytes at a time. */
static long argv_step(u32 i, struct exec_scratch **ctx)
{
	struct exec_scratch *s = *ctx;
	struct part_scratch *part = entry(&part_scratch, 0);

	if (!part || s->argv_left <= PART)
		return 1;
	if (bpf_probe_read_user(part->buf, PART, (void *)s->argv)) {
		s->argv_fault = 1;
		return 1;
	}
	part->head = s->rec.head;
	part->head.kind = ARGV;
	part->head.extra = PART;
	/* One that does not fit is found by the reader: argv_before tells what should have come. */
	bpf_ringbuf_output(&ring, part, sizeof(*part), 0);
	s->argv += PART;
	s->argv_left -= PART;
	s->argv_sent += PART;
	return 0;
}

static __always_inline u32 append_argv(struct exec_scratch *s, struct mm_struct *mm)
{
	u64 begin = mm->arg_start, size = mm->arg_end - begin;
	u32 flags = 0, off, left;

	if (size > settings.argv_limit) {
		size = settings.argv_limit;
		flags = ARGV_CUT;
	}
	s->argv = begin;
	s->argv_left = size;
	s->argv_sent = 0;
	s->argv_fault = 0;
	if (size > PART)
		bpf_loop(1024, argv_step, &s, 0);
	s->rec.argv_before = s->argv_sent;
	s->rec.argv_len = 0;
	off = s->str.off;
	left = s->argv_left;
	if (off > STRINGS || left > PART || s->argv_fault)
		return flags | (s->argv_fault ? ARGV_FAULT : 0);
	if (bpf_probe_read_user(s->buf + off, left, (void *)s->argv))
		return flags | ARGV_FAULT;
	s->rec.argv_len = left;
	return flags;
}

static __always_inline u32 append_strings(struct exec_scratch *s, struct task_struct *task, struct linux_binprm *bprm,
					  struct file *file)
{
	struct exec_record *rec = &s->rec;
	struct fs_struct *fs = task->fs;
	u32 flags = 0, from;
	long n;

	s->str.off = 0;
	if (!append_path(s, file->f_path.mnt, file->f_path.dentry))
		flags |= EXE_CUT;
	/* On a tmpfs, too, a name can be reached that is outside of the mount: there it is only a name. */
	if (s->str.detached && file->f_inode->i_sb->s_flags & SB_KERNMOUNT)
		flags |= EXE_DETACHED;
	rec->exe_len = from = s->str.off;

	if (!append_path(s, fs->pwd.mnt, fs->pwd.dentry))
		flags |= CWD_CUT;
	rec->cwd_len = s->str.off - from;
	from = s->str.off;

	if (!append_cgroup(&s->str, s->buf, task, 0))
		flags |= CGROUP_CUT;
	rec->cgroup_len = s->str.off - from;
	from = s->str.off;

	rec->file_len = 0;
	if (from > STRINGS - STRING)
		return flags | FILE_CUT;
	n = bpf_probe_read_kernel_str(s->buf + from, STRING, bprm->filename);
	if (n <= 0)
		return flags;
	rec->file_len = n - 1;
	s->str.off = from + n - 1;
	return n == STRING ? flags | FILE_CUT : flags;
}

SEC("tp_btf/sched_process_exec")
int on_exec(struct raw_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct linux_binprm *bprm = (void *)ctx->args[2];
	struct exec_scratch *s = entry(&exec_scratch, 0);
	const struct cred *cred;
	struct file *file;
	u32 flags;
	u64 size;

	if (!s)
		return 0;
	fill_head(&s->rec.head, EXEC, task);
	if (s->rec.head.pid == settings.mute_pid)
		return 0;
	announce_children(task, 0);
	/* A kernel that Clang compiled tells its verifier of __rcu, and that wants to see this checked. It is never NULL. */
	cred = task->cred;
	if (!cred)
		return 0;
	file = bprm->file;
	fill_ids(&s->rec, task, cred);
	fill_namespaces(&s->rec, task, cred);
	flags = fill_file(&s->rec, file);
	flags |= privileges(&s->rec, bprm, cred);
	if (bprm->interp != bprm->filename)
		flags |= SCRIPT;
	flags |= append_strings(s, task, bprm, file);
	s->rec.flags = flags;
	s->rec.shared_len = sizeof(s->rec) - offsetof(struct exec_record, inode) + s->str.off;
	s->rec.head.extra = append_argv(s, task->mm);
	/* Each exec counts self_exec_id up; a fork leaves it alone and remembers it. */
	if (task->self_exec_id == task->parent_exec_id + 1)
		s->rec.head.extra |= FIRST;
	size = sizeof(s->rec) + (u64)s->str.off + s->rec.argv_len;
	if (size > sizeof(s->rec) + sizeof(s->buf))
		return 0;
	emit(EXEC, &s->rec, size);
	return 0;
}

SEC("tp_btf/sched_process_fork")
int on_fork(struct raw_args *ctx)
{
	struct task_struct *parent = (void *)ctx->args[0], *child = (void *)ctx->args[1];
	bool elsewhere = child->cgroups != parent->cgroups;
	struct fork_scratch *s;
	u64 size;

	if (child->pid != child->tgid || child->flags & PF_KTHREAD) {
		count_seen(TASK);
		return 0;
	}
	if (!settings.every_fork) {
		if ((parent->group_leader->flags & (PF_FORKNOEXEC | PF_KTHREAD)) == PF_FORKNOEXEC)
			announce(parent);
		if (!elsewhere) {
			count_seen(FORK);
			return 0;
		}
	}
	s = entry(&fork_scratch, 0);
	if (!s)
		return 0;
	fill_head(&s->head, FORK, child);
	s->head.start /= settings.ns_per_tick;
	s->str.off = 0;
	/* clone3() can put the child elsewhere; else the reader knows the cgroup from the parent. */
	if (elsewhere)
		append_cgroup(&s->str, s->buf, child, 1);
	s->head.extra = s->str.off;
	size = sizeof(s->head) + (u64)s->str.off;
	if (size > sizeof(s->head) + sizeof(s->buf))
		return 0;
	emit(FORK, &s->head, size);
	return 0;
}

/* Workers of io_uring are not forked, so the tracepoint above does not tell of them; the kernel's total counts them. */
SEC("tp_btf/task_newtask")
int on_worker(struct raw_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];

	if (task->flags & PF_IO_WORKER)
		count_seen(TASK);
	return 0;
}

static long times_step(u32 i, struct cpu_times **ctx)
{
	struct cpu_times *t = *ctx;
	struct task_struct *task;

	if (!t->next || t->next == t->end)
		return 1;
	task = (void *)t->next - bpf_core_field_offset(struct task_struct, thread_node);
	t->utime += BPF_CORE_READ(task, utime);
	t->stime += BPF_CORE_READ(task, stime);
	t->runtime += BPF_CORE_READ(task, se.sum_exec_runtime);
	t->next = BPF_CORE_READ(task, thread_node.next);
	return 0;
}

/*
 * The scheduler adds up a task's time when it looks, at a tick or a switch. A life that ends before it ever looked has
 * none. But who never slept was running whenever it did not wait for a CPU, and the waiting is known.
 */
static __always_inline void complete_runtime(struct exit_record *rec, struct task_struct *task)
{
	u64 lived = rec->head.time - rec->head.start, waited;

	if (!bpf_core_field_exists(task->sched_info.run_delay) || task->nvcsw)
		return;
	waited = task->sched_info.run_delay;
	if (lived > waited && lived - waited > rec->runtime)
		rec->runtime = lived - waited;
}

/* What the group has used: threads that were released are summed up in signal_struct, the others are on its list. */
static __always_inline void fill_times(struct exit_record *rec, struct task_struct *task, struct signal_struct *signal,
				       int threads)
{
	struct cpu_times *t;

	rec->utime = signal->utime;
	rec->stime = signal->stime;
	rec->runtime = signal->sum_sched_runtime;
	if (threads > 1) {
		t = entry(&times, 0);
		if (!t)
			return;
		t->utime = t->stime = t->runtime = 0;
		t->next = signal->thread_head.next;
		t->end = (void *)signal + bpf_core_field_offset(struct signal_struct, thread_head);
		bpf_loop(4096, times_step, &t, 0);
		rec->utime += t->utime;
		rec->stime += t->stime;
		rec->runtime += t->runtime;
		return;
	}
	rec->utime += task->utime;
	rec->stime += task->stime;
	rec->runtime += task->se.sum_exec_runtime;
	if (threads == 1)
		complete_runtime(rec, task);
}

/* Pages in memory, as exact as mm_struct has them without a walk over the CPUs. */
static __always_inline u64 resident(struct mm_struct *mm)
{
	struct mm_struct___old *old = (void *)mm;
	s64 file, anon, shmem;

	if (bpf_core_field_exists(old->rss_stat.count)) {
		file = BPF_CORE_READ(old, rss_stat.count[0].counter);
		anon = BPF_CORE_READ(old, rss_stat.count[1].counter);
		shmem = BPF_CORE_READ(old, rss_stat.count[3].counter);
	} else {
		file = mm->rss_stat[0].count;
		anon = mm->rss_stat[1].count;
		shmem = mm->rss_stat[3].count;
	}
	return (file > 0 ? file : 0) + (anon > 0 ? anon : 0) + (shmem > 0 ? shmem : 0);
}

/*
 * Is this the end of the process? The last thread makes `live` 0, but threads that end at the same time may all find
 * it so: the first of them speaks, and leaves word. (6.16 added an argument that says it; older kernels lack it.)
 */
static __always_inline bool group_ended(struct signal_struct *signal, struct head *head, int threads)
{
	struct ended_key key = { .start = head->start, .pid = head->pid };
	u32 one = 1;

	if (signal->live.counter > 0)
		return false;
	if (threads > 1)
		return !bpf_map_update_elem(&ended, &key, &one, BPF_NOEXIST);
	return !bpf_map_lookup_elem(&ended, &key);
}

SEC("tp_btf/sched_process_exit")
int on_exit(struct raw_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	struct signal_struct *signal = task->signal;
	int threads = signal->nr_threads;
	struct exit_record rec = {};
	struct task_struct *leader;
	struct mm_struct *mm;

	if (task->flags & PF_KTHREAD)
		return 0;
	fill_head(&rec.head, EXIT, task);
	if (rec.head.pid == settings.mute_pid || !group_ended(signal, &rec.head, threads))
		return 0;
	announce_children(task, 1);
	fill_times(&rec, task, signal, threads);
	leader = task->group_leader;
	/* As wait_task_zombie() in kernel/exit.c. */
	rec.status = signal->flags & SIGNAL_GROUP_EXIT ? signal->group_exit_code : leader->exit_code;
	mm = task->mm;
	if (mm) {
		u64 peak = mm->hiwater_rss, now = resident(mm);

		rec.rss = peak > now ? peak : now;
	} else {
		rec.head.extra |= NO_MM;
	}
	rec.maxrss = signal->maxrss;
	bpf_core_read(rec.comm, sizeof(rec.comm), &leader->comm);
	emit(EXIT, &rec, sizeof(rec));
	return 0;
}

SEC("raw_tp/sys_exit")
int on_exec_failed(struct raw_args *ctx)
{
	void *regs = (void *)ctx->args[0];
	s64 ret = ctx->args[1];
	struct failed_record *rec;
	u64 arg = 0;
	u32 nr = 0;
	long n;

	if (ret >= 0)
		return 0;
	bpf_probe_read_kernel(&nr, sizeof(nr), regs + settings.nr_offset);
	if (nr == settings.nr_execve)
		bpf_probe_read_kernel(&arg, sizeof(arg), regs + settings.arg0_offset);
	else if (nr == settings.nr_execveat)
		bpf_probe_read_kernel(&arg, sizeof(arg), regs + settings.arg1_offset);
	else
		return 0;
	rec = entry(&failed_scratch, 0);
	if (!rec)
		return 0;
	fill_head(&rec->head, EXEC_FAILED, bpf_get_current_task_btf());
	if (rec->head.pid == settings.mute_pid)
		return 0;
	rec->error = -ret;
	n = bpf_probe_read_user_str(rec->file, sizeof(rec->file), (void *)arg);
	n = n > 0 ? n - 1 : 0;
	if (n > (long)sizeof(rec->file))
		return 0;
	rec->head.extra = n;
	emit(EXEC_FAILED, rec, sizeof(*rec) - sizeof(rec->file) + n);
	return 0;
}
