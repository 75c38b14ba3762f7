//! Durations in a table, and what processes cost (proc_pid_smaps_rollup(5), proc_pid_stat(5)).

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Durations by step and endpoint, and by the round in which they were measured.
#[derive(Default)]
pub(crate) struct Table {
    steps: Vec<String>,
    endpoints: Vec<String>,
    values: BTreeMap<(String, String), BTreeMap<u32, Vec<f64>>>,
}

impl Table {
    /// Adds one measurement.
    pub(crate) fn add(&mut self, step: &str, endpoint: &str, round: u32, took: Duration) {
        if !self.steps.iter().any(|s| s == step) {
            self.steps.push(step.to_owned());
        }
        if !self.endpoints.iter().any(|e| e == endpoint) {
            self.endpoints.push(endpoint.to_owned());
        }
        self.values
            .entry((step.to_owned(), endpoint.to_owned()))
            .or_default()
            .entry(round)
            .or_default()
            .push(took.as_secs_f64() * 1000.0);
    }

    /// Prints it, one row for each step: the endpoints, in the order `names`, then the first of them against each other one.
    pub(crate) fn print(&mut self, title: &str, names: &[&str]) {
        let place = |name: &String| names.iter().position(|one| one == name);
        self.endpoints.sort_by_key(place);
        let Some((first, others)) = self.endpoints.split_first() else {
            return;
        };
        println!("\n{title}");
        print!("  {:24}", "");
        for endpoint in &self.endpoints {
            print!("{endpoint:>28}");
        }
        for other in others {
            print!("{:>28}", format!("{first} / {other}"));
        }
        println!();
        for step in &self.steps {
            print!("  {step:24}");
            for endpoint in &self.endpoints {
                print!("{:>28}", spread(&self.all(step, endpoint)));
            }
            for other in others {
                print!("{:>28}", self.ratio(step, first, other));
            }
            println!();
        }
    }

    fn rounds(&self, step: &str, endpoint: &str) -> Option<&BTreeMap<u32, Vec<f64>>> {
        self.values.get(&(step.to_owned(), endpoint.to_owned()))
    }

    fn all(&self, step: &str, endpoint: &str) -> Vec<f64> {
        let rounds = self.rounds(step, endpoint).into_iter();
        sorted(rounds.flat_map(BTreeMap::values).flatten().copied())
    }

    /// What one took of what the other took in the same round.
    fn ratio(&self, step: &str, one: &str, other: &str) -> String {
        let (Some(one), Some(other)) = (self.rounds(step, one), self.rounds(step, other)) else {
            return "-".to_owned();
        };
        let median = |values: &Vec<f64>| at(&sorted(values.iter().copied()), 50);
        let pairs = one
            .iter()
            .filter_map(|(round, values)| Some(median(values) / median(other.get(round)?)));
        let ratios = sorted(pairs);
        let (low, high) = interval(&ratios);
        format!("{:.3} ({low:.3}..{high:.3})", at(&ratios, 50))
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    all
}

/// The value below which `part` percent of the sorted values lie; of two in the middle, what is between them.
fn at(sorted: &[f64], part: usize) -> f64 {
    let value = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    if part == 50 && sorted.len().is_multiple_of(2) && !sorted.is_empty() {
        let half = sorted.len() / 2;
        return f64::midpoint(value(half - 1), value(half));
    }
    value((sorted.len() * part / 100).min(sorted.len().saturating_sub(1)))
}

fn spread(sorted: &[f64]) -> String {
    let part = |part| at(sorted, part);
    format!("{:.2} ({:.2}..{:.2})", part(50), part(0), part(90))
}

/// Where the median lies with a probability of 95 %, whatever the distribution: between the values whose ranks are
/// (n - 1.96 sqrt(n)) / 2 from either end. Of fewer than six values: the lowest and the highest.
fn interval(sorted: &[f64]) -> (f64, f64) {
    let n = sorted.len();
    let low = n.saturating_sub((n * 38416 / 10000).isqrt() + 1) / 2;
    let value = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    (value(low), value(n.saturating_sub(low + 1)))
}

/// Which processes belong to a runtime.
#[derive(Clone, Debug, Default)]
pub(crate) struct Processes {
    /// Their names (`comm`).
    pub(crate) names: Vec<String>,
    /// Two builds have the same names: then only the daemon counts, and what is in cgroups below this one (`/name`).
    pub(crate) cgroup: Option<String>,
    /// The daemon's pid.
    pub(crate) daemon: Option<i32>,
}

impl Processes {
    fn has(&self, pid: &str, comm: &str) -> bool {
        if !self.names.iter().any(|name| name == comm) {
            return false;
        }
        let Some(root) = &self.cgroup else {
            return true;
        };
        let below = |line: &str| {
            let path = line
                .splitn(3, ':')
                .nth(2)
                .and_then(|p| p.strip_prefix(&**root));
            path.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        self.daemon.is_some_and(|daemon| daemon.to_string() == pid) || cgroups.lines().any(below)
    }
}

fn pids(of: &Processes) -> Vec<(String, String)> {
    let mut found = vec![];
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if of.has(&pid, comm.trim_end()) {
            found.push((pid, comm.trim_end().to_owned()));
        }
    }
    found
}

/// Proportional set size in KiB of a runtime's processes, summed by their name.
pub(crate) fn pss_kib(of: &Processes) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (pid, name) in pids(of) {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = pss
            .and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0);
        *sums.entry(name).or_default() += kib;
    }
    sums
}

/// CPU time used so far by a runtime's processes, in seconds.
pub(crate) fn cpu_seconds(of: &Processes) -> f64 {
    let mut ns = 0u64;
    for (pid, _) in pids(of) {
        for task in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            ns += text
                .split(' ')
                .next()
                .and_then(|v| v.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    ns as f64 / 1e9
}
