/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few kernel types that the programs read, and of each only the fields that they touch.
 *
 * `preserve_access_index` makes every access a CO-RE relocation: the kernel that loads the programs looks the field up
 * by name in its own BTF, so the offsets, order and completeness here do not matter. A suffix of three underscores
 * (`___old`) is a flavour of the same kernel type, for a field that had another name in another release.
 */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;
typedef long long s64;
typedef _Bool bool;
#define true 1
#define false 0

/* Names that libbpf's bpf_helper_defs.h takes from the kernel's headers. */
typedef u8 __u8;
typedef u16 __u16;
typedef u32 __u32;
typedef u64 __u64;
typedef s32 __s32;
typedef s64 __s64;
typedef u16 __be16;
typedef u32 __be32;
typedef u32 __wsum;

/* include/uapi/linux/bpf.h */
enum {
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_NOEXIST = 1,
	BPF_F_MMAPABLE = 1 << 10,
};

struct raw_args {
	u64 args[3];
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct list_head {
	struct list_head *next;
};

struct atomic {
	int counter;
};

struct qstr {
	const char *name;
};

struct hlist_bl_node {
	struct hlist_bl_node **pprev;
};

struct super_block {
	u32 s_dev;
	unsigned long s_flags;
};

struct inode {
	u16 i_mode;
	u32 i_nlink;
	unsigned long i_ino;
	s64 i_size;
	struct super_block *i_sb;
};

struct dentry {
	struct hlist_bl_node d_hash;
	struct dentry *d_parent;
	struct qstr d_name;
};

struct vfsmount {
	struct dentry *mnt_root;
};

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct file {
	struct path f_path;
	struct inode *f_inode;
};

struct fs_struct {
	struct path pwd;
};

/* `parent` was renamed in 6.15. */
struct kernfs_node {
	struct kernfs_node *__parent;
	const char *name;
};
struct kernfs_node___old {
	struct kernfs_node *parent;
};

struct cgroup_root {
	u32 subsys_mask;
	char name[64];
};

struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct cgrp_cset_link {
	struct cgroup *cgrp;
	struct list_head cgrp_link;
};

struct css_set {
	struct cgroup *dfl_cgrp;
	struct list_head cgrp_links;
};

/* Which exist, and their values, depends on the kernel's configuration. */
enum cgroup_subsys_id {
	cpuset_cgrp_id,
	cpu_cgrp_id,
	cpuacct_cgrp_id,
	io_cgrp_id,
	memory_cgrp_id,
	devices_cgrp_id,
	freezer_cgrp_id,
	pids_cgrp_id,
};

struct ns_common {
	u32 inum;
};

struct uid_gid_extent {
	u32 first;
	u32 lower_first;
};

struct uid_gid_map {
	struct uid_gid_extent extent[5];
};

struct user_namespace {
	struct uid_gid_map uid_map;
	struct ns_common ns;
};

struct uts_namespace { struct ns_common ns; };
struct ipc_namespace { struct ns_common ns; };
struct mnt_namespace { struct ns_common ns; };
struct net { struct ns_common ns; };
struct cgroup_namespace { struct ns_common ns; };
struct time_namespace { struct ns_common ns; };
struct pid_namespace { struct ns_common ns; };

struct nsproxy {
	struct uts_namespace *uts_ns;
	struct ipc_namespace *ipc_ns;
	struct mnt_namespace *mnt_ns;
	struct net *net_ns;
	struct time_namespace *time_ns;
	struct cgroup_namespace *cgroup_ns;
};

struct upid {
	int nr;
	struct pid_namespace *ns;
};

struct pid {
	u32 level;
	struct upid numbers[1];
};

struct id {
	u32 val;
};

/* Two 32-bit words until 6.3, one of 64 bits since: the same eight bytes. */
struct caps {
	u64 val;
};

struct cred {
	struct id uid, gid, euid, egid;
	struct caps cap_permitted;
	struct caps cap_ambient;
	struct user_namespace *user_ns;
};

struct tty_driver {
	int major;
	int minor_start;
};

struct tty_struct {
	int index;
	struct tty_driver *driver;
};

struct percpu_counter {
	s64 count;
};

struct atomic_long {
	s64 counter;
};

/* Until 6.2 the counters were atomic longs in a structure; since then each is a percpu_counter. */
struct mm_rss_stat___old {
	struct atomic_long count[4];
};

struct mm_struct {
	unsigned long hiwater_rss;
	unsigned long arg_start, arg_end;
	struct percpu_counter rss_stat[4];
};
struct mm_struct___old {
	struct mm_rss_stat___old rss_stat;
};

struct signal_struct {
	struct atomic live;
	int nr_threads;
	struct list_head thread_head;
	int group_exit_code;
	u32 flags;
	struct pid *pids[4];
	struct tty_struct *tty;
	u64 utime, stime;
	u64 sum_sched_runtime;
	unsigned long maxrss;
};

struct sched_entity {
	u64 sum_exec_runtime;
};

struct sched_info {
	unsigned long long run_delay;
};

struct task_struct {
	u32 flags;
	struct sched_info sched_info;
	unsigned long nvcsw;
	struct sched_entity se;
	struct mm_struct *mm;
	int exit_code;
	int pid, tgid;
	struct task_struct *real_parent;
	struct list_head children, sibling;
	struct task_struct *group_leader;
	struct list_head thread_node;
	struct pid *thread_pid;
	u64 utime, stime;
	u64 start_boottime;
	u64 parent_exec_id, self_exec_id;
	const struct cred *cred;
	char comm[16];
	struct fs_struct *fs;
	struct nsproxy *nsproxy;
	struct signal_struct *signal;
	struct id loginuid;
	struct css_set *cgroups;
};

struct linux_binprm {
	struct file *file;
	u32 per_clear;
	const char *filename;
	const char *interp;
};

#pragma clang attribute pop

enum {
	PF_IO_WORKER = 0x00000010,
	PF_FORKNOEXEC = 0x00000040,
	PF_KTHREAD = 0x00200000,
	SB_KERNMOUNT = 1 << 22,
	SIGNAL_GROUP_EXIT = 4,
	PIDTYPE_SID = 3,
	S_ISUID = 04000,
	S_ISGID = 02000,
	S_IXGRP = 00010,
};
