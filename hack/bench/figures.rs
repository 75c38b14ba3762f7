//! Durations in a table, and what processes cost (proc_pid_smaps_rollup(5), proc_pid_stat(5)).

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// Durations by step and endpoint.
#[derive(Default)]
pub(crate) struct Table {
    steps: Vec<String>,
    endpoints: Vec<String>,
    values: BTreeMap<(String, String), Vec<Duration>>,
}

impl Table {
    /// Adds one measurement.
    pub(crate) fn add(&mut self, step: &str, endpoint: &str, took: Duration) {
        if !self.steps.iter().any(|s| s == step) {
            self.steps.push(step.to_owned());
        }
        if !self.endpoints.iter().any(|e| e == endpoint) {
            self.endpoints.push(endpoint.to_owned());
        }
        self.values
            .entry((step.to_owned(), endpoint.to_owned()))
            .or_default()
            .push(took);
    }

    /// Prints it, one row for each step.
    pub(crate) fn print(&self, title: &str) {
        println!("\n{title}");
        print!("  {:24}", "");
        for endpoint in &self.endpoints {
            print!("{endpoint:>28}");
        }
        println!();
        for step in &self.steps {
            print!("  {step:24}");
            for endpoint in &self.endpoints {
                let mut all = self
                    .values
                    .get(&(step.clone(), endpoint.clone()))
                    .cloned()
                    .unwrap_or_default();
                all.sort();
                let at = |part: usize| {
                    all.get((all.len() * part / 100).min(all.len().saturating_sub(1)))
                        .map_or(f64::NAN, |d| d.as_secs_f64() * 1000.0)
                };
                print!(
                    "{:>28}",
                    format!("{:.2} ({:.2}..{:.2})", at(50), at(0), at(90))
                );
            }
            println!();
        }
    }
}

fn pids(names: &[String]) -> Vec<(String, String)> {
    let mut found = vec![];
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if names.iter().any(|name| name == comm.trim_end()) {
            found.push((pid, comm.trim_end().to_owned()));
        }
    }
    found
}

/// Proportional set size in KiB, summed by process name.
pub(crate) fn pss_kib(names: &[String]) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (pid, name) in pids(names) {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = pss
            .and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0);
        *sums.entry(name).or_default() += kib;
    }
    sums
}

/// CPU time used so far by processes of these names, in seconds.
pub(crate) fn cpu_seconds(names: &[String]) -> f64 {
    let mut ns = 0u64;
    for (pid, _) in pids(names) {
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
